"""HuggingFace transformers: wrap a model, load one. The only package here that imports transformers."""

try:
    import transformers  # noqa: F401  # checked here, once, for a message that names the extra
except ImportError as error:
    raise ImportError('wrapping a model needs transformers: pip install "dbattn[hf]"') from error

from ..windows import Windows
from .decoder import UnsupportedModelError
from .load import load_model
from .wrap import Handle, wrap

__all__ = ["Handle", "UnsupportedModelError", "Windows", "load_model", "wrap"]
