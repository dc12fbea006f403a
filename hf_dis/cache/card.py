"""The card of a cache as a dataset of the Hub: metadata that the Hub and ``datasets`` read, and a text."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import DatasetCardData

from hf_dis.cache.header import HEADER, CacheHeader
from hf_dis.models.provenance import is_hub_name

TEXT = """# Teacher targets

Targets of {teacher} for {examples:,} examples at temperature {header.temperature:g}.
Each of the {items:,} items holds the {header.depth} likeliest of {header.num_classes:,} classes, with their
log-probabilities, and {header.sample_size} classes sampled from the remaining ones (design: {header.design}).
An item takes {item_bytes} bytes, and the shards take {header.num_bytes:,} bytes.
The teacher's revision is {revision}. Its weights have the xxh3_128 `{header.teacher[weights]}`. {license}
Written by hf_dis, read by `hf_dis.TeacherCache`; `{file}` holds the settings.
"""
# The Hub's names of sizes, by the powers of ten between them, from 10^3 on.
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def cache_card(header: CacheHeader, license: Mapping[str, str]) -> str:
    """Writes the README of a cache.

    A teacher of the Hub is a tag, ``teacher:`` and its name. The licence is that of the teacher's checkpoint; the
    licence of the dataset that the teacher was given is not known here.

    Args:
        header: of the complete cache.
        license: of the teacher's checkpoint, as :func:`hf_dis.models.provenance.known_license` finds it.
    """
    name, revision = header.teacher["name"], header.teacher["revision"]
    examples = header.dataset["examples"]
    data = DatasetCardData(
        **license,
        pretty_name=f"Teacher targets of {name}",
        annotations_creators=["machine-generated"],
        size_categories=[SIZES[min(max(0, len(str(examples)) - 3), len(SIZES) - 1)]],
        tags=["hf_dis", "knowledge-distillation", *([f"teacher:{name}"] if is_hub_name(name, revision) else [])],
        configs=[{"config_name": "default", "data_files": "*.arrow"}],
    )
    text = TEXT.format(
        header=header,
        teacher=f"[{name}](https://huggingface.co/{name})" if is_hub_name(name, revision) else name,
        examples=examples,
        items=sum(shard.items for shard in header.shards),
        item_bytes=header.layout.item_bytes,
        revision=revision or "unknown",
        license="The licence above is the teacher's." if license else "The teacher's licence is unknown.",
        file=HEADER,
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"
