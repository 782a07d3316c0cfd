from importlib.metadata import version

from acme_lora import LoraLinear
from harness import Capabilities, Factors, load_exactly


class AcmeAdapter:
    name, version = "acme", version("acme-lora")
    capabilities = Capabilities(features={"merge", "unmerge"})

    def inject(self, model, config):
        model.requires_grad_(False)
        config.replace(model, lambda _, linear: LoraLinear(linear, config.r, config.scaling))
        return model

    def layers(self, model):
        return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}

    def factors(self, model):
        return {
            name: [Factors(m.lora_A, m.lora_B, m.scaling)] for name, m in self.layers(model).items()
        }

    def state_dict(self, model):
        return {k: v for k, v in model.state_dict().items() if k.endswith(("lora_A", "lora_B"))}

    def load_state_dict(self, model, state):
        self.unmerge(model)
        load_exactly(self.state_dict(model), state)

    def merge(self, model):
        [m.merge() for m in self.layers(model).values()]

    def unmerge(self, model):
        [m.unmerge() for m in self.layers(model).values()]
