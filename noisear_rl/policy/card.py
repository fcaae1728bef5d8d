"""How a policy goes to the Hub, and the card that ``save_pretrained`` and ``push_to_hub`` write beside its weights."""

import dataclasses  # no postponed annotations: the hub mixin reads the type of a subclass's ``config``
import math
from typing import Any

import yaml
from huggingface_hub import ModelCard, PyTorchModelHubMixin

CARD = """---
{{ card_data }}
---
# A noise prior

Draws the initial noise of a diffusion model patch by patch, as its prompt asks
([NoiseAR](https://arxiv.org/abs/2506.01337)). Written by noisear-rl {{ version }}.

| | |
|---|---|
| noise | {{ noise }} |
| text | width {{ text_dim }}, read by `{{ text_encoder }}` |
| parameters | {{ parameters }} |

```python
from noisear_rl import load_policy

policy = load_policy("{{ place }}")
latents = policy.noise(policy.sample(text, text_mask, seeds=[0]))  # the argument `latents` of a diffusers pipeline
```
{{ evaluation }}{{ training }}
## Configuration
```yaml
{{ options }}```

Licence: Apache-2.0.
"""


class PolicyHubMixin(
    PyTorchModelHubMixin,
    library_name="noisear-rl",
    tags=["noise-prior", "diffusion", "reinforcement-learning"],
    license="apache-2.0",
    model_card_template=CARD,
):
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of a policy, with a card that describes it."""

    config: Any
    n_patches: int
    patch_dim: int

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, filled in; other keyword arguments, such as ``training``, go to its template.

        A network alone does not know how it was trained: :mod:`noisear_rl.report.hub` adds data, command, commit and
        evaluation of its run.
        """
        import noisear_rl

        options = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self.config).items()}
        shape = " × ".join(map(str, self.config.latent_shape))
        facts = {
            "version": noisear_rl.__version__,
            "noise": f"{shape} ({math.prod(self.config.latent_shape):,} numbers) in {self.n_patches} patches",
            "text_dim": self.config.text_dim,
            "text_encoder": self.config.text_encoder,
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",  # type: ignore[attr-defined]
            "options": yaml.safe_dump(options, sort_keys=False),
            "place": "FOLDER_OR_HUB_ID",
            "evaluation": "",
            "training": "",
        }
        return super().generate_model_card(*args, **facts | kwargs)
