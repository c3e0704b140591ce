"""The attention and mask functions that transformers calls, and their registration."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ..config import RetrievalConfig
from ..dense import masked_attention, merge_sink
from .batch import EACH, attend_each
from .cache import DatabaseLayer
from .session import forward_pass
from .stored_rows import plain

NAME = "dbattn"
# Arguments of other attention implementations that change the answer and cannot be honoured here.
UNSUPPORTED = ("position_bias", "cache", "block_table", "cu_seq_lens_q", "cu_seq_lens_k")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo cannot look into the kernels
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: q ``[B, Hq, m, D]``, k and v ``[B, Hkv, T, D]``.

    Rows of a database are detached: backward through its answers raises RuntimeError.
    """
    given = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if given or dropout:
        what = ", ".join(given) or f"dropout={dropout}"
        raise NotImplementedError(f"{type(module).__name__} asks for {what}, which dbattn does not serve")
    if hasattr(key, EACH):
        options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
        return attend_each(attention_function, module, query, key, **options), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    under_way = forward_pass.get()
    if under_way is not None:
        scale *= under_way.sharpening
    layer: DatabaseLayer | None = getattr(key, "_dbattn", None)
    padding: Tensor | None = getattr(attention_mask, "_dbattn_start", None)
    if padding is None and attention_mask is not None and under_way is not None:
        padding = under_way.padding_of(attention_mask)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    values_too = layer is getattr(value, "_dbattn", None)
    if layer is not None and layer.db is not None and values_too:
        db = layer.db
        start = padding
        if start is None:
            start = torch.zeros_like(db.start) if db.has_padding else db.start
        # The newest position sees every row either way: one query is causal.
        in_order = causal or query.shape[2] == 1
        if in_order and (attention_mask is None or padding is not None) and db.can_start_at(start):
            db.set_start(start)
            switches, before = layer.session.switches, db.stats.retrieving
            audits = switches.audits
            # What a draft leaves unread, the dense pass after it makes up for.
            asked = db.by_size() if switches.drafting else db
            out = asked.attend(
                query,
                scale=scale,
                softcap=softcap,
                sink_logits=s_aux,
                retrieve=switches.retrieve,
                audit=True if audits is not None else _audit(db.config, query, drafting=switches.drafting),
                until=None if under_way is None else under_way.until,
            )
            if audits is not None and db.stats.retrieving > before:
                audits.append(db.stats.audits[-1])
            if switches.watcher is not None:
                switches.watcher(layer.layer_index, db, query.detach(), scale, softcap)
            if not switches.capturing:  # a graph would do it again, as it is done now
                db.note_queries(query, len(db) - query.shape[2])
            # Only now: an index may move rows, and the newest queries see only what came before them.
            if switches.sync and not switches.capturing:
                db.sync(reading=query.shape[2] > db.config.max_queries)
            assert isinstance(out, Tensor)
            return _as_sdpa_returns(out), None
        reason = "the mask is not causal with left padding" if in_order else "the model's attention is not causal here"
        if layer.base is not None:
            raise ValueError(f"{reason}: no such mask can be honoured over windows, some of which are not read")
        layer.session.note_dense(layer.layer_index, reason, query, key, value)
        db.release()
    elif layer is not None:
        reason = "the model changed the values after its cache"
        layer.session.note_dense(layer.layer_index, reason, query, key, value)
    elif under_way is not None:
        under_way.note_bypass(getattr(module, "layer_idx", None), query, key, value)
    out = _foreign(query, plain(key), plain(value), attention_mask, scale, softcap, s_aux, causal)
    return _as_sdpa_returns(out), None


def _audit(config: RetrievalConfig, query: Tensor, *, drafting: bool) -> bool | None:
    """Whether a call of a model may be audited where one is due: False, or None.

    Whether a draft was right, the dense pass after it tells. The few positions of a question wait for none either:
    all layers audit the same call, which takes a multiple of its time, and a reader waits for its first token; the
    next token's call makes up for it. Where every call is to be audited, or the ladder learns, so are these.
    """
    every = config.audit_rate == 1.0 or config.max_error is not None
    return False if drafting or (query.shape[2] > 1 and not every) else None


def _as_sdpa_returns(out: Tensor) -> Tensor:
    """``[B, Hq, m, Dv]`` as ``[B, m, Hq, Dv]``, in the type that torch's own attention has under autocast."""
    device = out.device.type
    if torch.is_autocast_enabled(device):
        out = out.to(torch.get_autocast_dtype(device))
    return out.transpose(1, 2).contiguous()


def _foreign(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
    causal: bool,
) -> Tensor:
    """Exact attention for what dbattn does not serve, under whatever mask the model made."""
    m, rows = query.shape[2], key.shape[2]
    if mask is None and m > 1 and causal:
        mask = torch.ones(m, rows, dtype=torch.bool, device=query.device).tril(rows - m)
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        if mask is None:
            return out
        # A query that may see no row (padding) has no defined answer; zero keeps it out of everything else.
        hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
        return out.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    out, lse = masked_attention(query, key, value, mask, scale=scale, softcap=softcap)
    if s_aux is not None:
        out, _ = merge_sink(out, lse, s_aux)
    return out.to(query.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its answer carries an attribute
def mask_of_model(
    *, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, kv_length: int, **kwargs: Any
) -> Tensor | None:
    """The mask that goes with it: None where plain causal order says all, else bool ``[B, 1, m, T]``.

    A mask that is causal order plus left padding carries the first valid row of each batch row as an attribute.
    """
    # A static cache has slots after the newest row: there, causal order is not the whole mask.
    no_later_rows = kwargs["q_offset"] + kwargs["q_length"] == kv_length + kwargs.get("kv_offset", 0)
    plain = mask_function is causal_mask_function and bool(no_later_rows)
    valid = None if attention_mask is None else attention_mask[:, :kv_length].bool()
    # transformers hides rows beyond a mask that is too short.
    if plain and (valid is None or (valid.shape[1] == kv_length and bool(valid.all()))):
        return None
    kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(
        mask_function=mask_function, attention_mask=attention_mask, kv_length=kv_length, **kwargs
    )
    if plain and mask is not None and valid is not None and valid.shape[1] == kv_length:
        start = torch.where(valid.any(dim=1), valid.int().argmax(dim=1), kv_length)
        if torch.equal(valid.sum(dim=1), kv_length - start):
            mask._dbattn_start = start  # type: ignore[attr-defined]  # rides along to the attention function
            under_way = forward_pass.get()
            if under_way is not None:
                under_way.padded = mask, start
    return mask


_wrapped_models = 0


def register() -> None:
    """Make the names known to transformers, process-wide."""
    global _wrapped_models
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_of_model)
    _wrapped_models += 1


def unregister() -> None:
    """Clear the process-global names when the last wrapped model is given back."""
    global _wrapped_models
    _wrapped_models -= 1
    if not _wrapped_models:
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)
