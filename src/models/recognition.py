"""Finds the layout of proteins that a model was trained on.

The tokenizer says which layouts of the table it can write. Where these are several, the model
decides: known natural proteins are likelier in the layout that it has seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from src.common.cli import say
from src.models.forward import final_hidden_states, output_head, stated_positions
from src.proteins.encoding import Spelling, require_known, token_letters
from src.proteins.layouts import (
    LAYOUTS,
    PROTGPT2,
    STANDARD_RESIDUES,
    Layout,
    TaggedProtein,
    layout_of,
    set_layout,
    spelt_out,
    stated_layout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NATURAL = (
    TaggedProtein(  # lysozyme of hen egg white
        "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVN"
        "CAKKIVSDGNGMNAWVAWRNRCKGTDVQAWIRGCRL",
        "3.2.1.17",
    ),
    TaggedProtein(  # ubiquitin
        "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG", "2.3.2.27"
    ),
    TaggedProtein(  # human haemoglobin, alpha
        "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLR"
        "VDPVNFKLLSHCLLVTLAAHLPAEFTPAVHASLDKFLASVSTVLTSKYR",
        "1.11.1.7",
    ),
    TaggedProtein(  # green fluorescent protein
        "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTFSYGVQCFSRYPDHMKQHDFFKSAMPEGYV"
        "QERTIFFKDDGNYKTRAEVKFEGDTLVNRIELKGIDFKEDGNILGHKLEYNYNSHNVYIMADKQKNGIKVNFKIRHNIEDGSVQLADHYQQNT"
        "PIGDGPVLLPDNHYLSTQSALSKDPNEKRDHMVLLEFVTAAGITHGMDELYK",
        "1.1.1.1",
    ),
)
"""Proteins that any model of proteins has seen; the tags are those of real enzymes."""
CLEARLY = 0.05
"""Nats per residue by which a layout must be better than one that stands before it in the table."""
_MARKER = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]|[0-9]")


def candidates(tokenizer: Any) -> list[Layout]:
    """Return the layouts of the table that a tokenizer can write, in the table's order."""
    possible: list[Layout] = []
    vocabulary = tokenizer.get_vocab()
    for name, template in LAYOUTS.items():
        if name == "progen" and "3" in vocabulary:  # digits are text there, not markers
            continue
        if name == "spaced" and any(layout.body == "residues" for layout in possible):
            continue
        try:
            layout = spelt_out(template, tokenizer)
        except ValueError:
            continue
        markers = _MARKER.findall("".join(layout.parts))
        if all(marker in vocabulary for marker in markers) and writes(tokenizer, layout):
            possible.append(layout)
    return possible


def writes(tokenizer: Any, layout: Layout) -> bool:
    """Return whether a tokenizer has tokens for all that a layout writes, its tags aside."""
    layout = layout.untagged
    texts = [layout.text(STANDARD_RESIDUES)] + (["\n"] if "\n" in layout.template else [])
    ids, *breaks = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    letters = token_letters(tokenizer)
    if not all(breaks) or any(not 0 <= i < len(letters) for i in ids):
        return False
    # Some tokenizers leave out what they have no token for, without a word.
    if "".join(tokenizer.decode(ids).split()) != "".join(texts[0].split()):
        return False
    unknown = tokenizer.unk_token_id
    is_marker = tokenizer.unk_token is not None and tokenizer.unk_token in layout.template
    if not is_marker and any(unknown in row for row in (ids, *breaks)):
        return False
    return "".join(letters[i] for i in ids) == STANDARD_RESIDUES


@torch.no_grad()
def nats_per_residue(model: PreTrainedModel, tokenizer: Any, layout: Layout) -> np.ndarray:
    """Return what each natural protein's residues cost in a layout, without markers and breaks."""
    spelling, longest = Spelling(tokenizer, layout), stated_positions(model.config)
    head, costs = output_head(model), []
    for protein in NATURAL:
        ids = tokenizer(layout.text(protein), add_special_tokens=False)["input_ids"][:longest]
        require_known(max(ids), model.config.vocab_size)
        row = torch.tensor([ids], device=model.device)
        logits = head.logits(final_hidden_states(model, row))[0, :-1].float()
        sizes = torch.as_tensor(spelling.sizes(ids)[1:], device=model.device)
        nll = F.cross_entropy(logits, row[0, 1:], reduction="none")
        costs.append(float(nll[sizes > 0].sum() / sizes.sum().clamp(min=1)))
    return np.array(costs)


def settle_layout(
    model: PreTrainedModel, tokenizer: Any, announce: Callable[[str], None] = say
) -> Layout:
    """Let a tokenizer carry its model's layout, and say which where it is not ProtGPT2's.

    A layout that it carries already is kept. The model is in eval mode.
    """
    known = stated_layout(tokenizer)
    possible = [] if known else candidates(tokenizer)
    how = "as its tokenizer says" if known else "the only one that its tokenizer writes"
    if possible:
        chosen, cost = possible[0], None
        for other in possible[1:]:
            cost = nats_per_residue(model, tokenizer, chosen) if cost is None else cost
            other_cost = nats_per_residue(model, tokenizer, other)
            if (other_cost < cost).all() and other_cost.mean() < cost.mean() - CLEARLY:
                how = (
                    f"natural proteins cost {other_cost.mean():.2f} nats per residue in it, "
                    f"{cost.mean():.2f} in {chosen.name}"
                )
                chosen, cost = other, other_cost
        set_layout(tokenizer, chosen)
    layout = layout_of(tokenizer)
    if layout != PROTGPT2:
        announce(f"layout of proteins: {layout.name!r} ({how})")
    return layout
