"""Clips by index: digits derive from (seed, index), latents are read from FastVideo's parquet shards."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from mla_convert.distill.clip_shards import SCHEMA, Clip, write_latents
from mla_convert.distill.data import DataConfig, DigitClips, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.order import DataOrder, MicroBatches
from mla_convert.errors import UserError


def make_clips(count, latent=(4, 3, 6, 5), text=(7, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        Clip(
            torch.randn(latent, generator=generator).to(dtype),
            torch.randn(text, generator=generator).to(dtype),
            caption=f"caption {number}",
            fps=16.0,
        )
        for number in range(count)
    ]


def open_latents(folder, heldout=1, **settings):
    return open_data(
        DataConfig(kind="latents", folder=str(folder), heldout=heldout, **{"split": "last", **settings}), seed=0
    )


def test_digits_derive_from_seed_and_index():
    first, again, other = DigitClips(0).example(5), DigitClips(0).example(5), DigitClips(1).example(5)
    assert first["latents"].shape == (1, 16, 16, 16)
    assert first["encoder_hidden_states"].shape == (3, 32)
    assert first["latents"].dtype == torch.float32
    assert torch.equal(first["latents"], again["latents"])
    assert not torch.equal(first["latents"], other["latents"])
    assert not torch.equal(first["latents"], DigitClips(0).example(6)["latents"])


def test_heldout_digits_are_the_same_for_every_seed_and_count():
    clips = open_data(DataConfig(), seed=0).heldout()
    few = open_data(DataConfig(), seed=7).heldout(10)
    assert clips["latents"].shape == (128, 1, 16, 16, 16)
    assert torch.equal(few["latents"], clips["latents"][:10])
    assert torch.equal(few["encoder_hidden_states"], clips["encoder_hidden_states"][:10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_come_back_in_any_order(tmp_path, dtype):
    clips = make_clips(7, dtype=dtype)
    shards = write_latents(tmp_path, clips, clips_per_shard=3)
    assert [path.name for path in shards] == [f"shard-0000{n}.parquet" for n in range(3)]
    data = open_latents(tmp_path, heldout=2)
    assert data.size == 5
    for index in (4, 0, 3, 2, 1):
        example = data.example(index)
        assert example["latents"].dtype == torch.float32
        assert torch.equal(example["latents"], clips[index].latents.float())
        assert torch.equal(example["encoder_hidden_states"], clips[index].encoder_hidden_states.float())
    assert torch.equal(data.heldout()["latents"], torch.stack([clip.latents.float() for clip in clips[5:]]))
    assert len(data.heldout(1)["latents"]) == 1
    assert len(data.heldout(9)["latents"]) == 2


def test_shards_have_the_schema_and_one_clip_a_row_group(tmp_path):
    (path,) = write_latents(tmp_path, make_clips(3))
    shard = pq.ParquetFile(path)
    assert shard.schema_arrow.equals(SCHEMA)
    assert shard.num_row_groups == 3
    row = shard.read().to_pylist()[1]
    assert (row["caption"], row["num_frames"], row["vae_latent_dtype"]) == ("caption 1", 3, "float32")
    assert row["vae_latent_shape"] == [4, 3, 6, 5]


def test_shards_can_be_added_to_a_folder(tmp_path):
    clips = make_clips(4)
    write_latents(tmp_path, clips[:2], clips_per_shard=2)
    write_latents(tmp_path, clips[2:], clips_per_shard=2, first_shard=1)
    assert torch.equal(LatentShards(tmp_path).read(3)["latents"], clips[3].latents)


def test_larger_row_groups_are_read_too(tmp_path):
    clips = make_clips(5)
    (path,) = write_latents(tmp_path / "small", clips)
    (tmp_path / "large").mkdir()
    pq.write_table(pq.read_table(path), tmp_path / "large" / "data.parquet", row_group_size=2)
    shards = LatentShards(tmp_path / "large")
    assert all(torch.equal(shards.read(i)["latents"], clip.latents) for i, clip in enumerate(clips))


def test_short_captions_are_padded_with_zeros(tmp_path):
    short, long = make_clips(1, text=(2, 8))[0], make_clips(1, text=(6, 8))[0]
    write_latents(tmp_path, [short, long])
    with pytest.raises(UserError, match=r"text embedding of 6x8, the first clip has 2x8; set text_tokens"):
        LatentShards(tmp_path)
    with pytest.raises(UserError, match=r"has 6 text tokens; raise text_tokens: 5"):
        LatentShards(tmp_path, text_tokens=5)
    text = LatentShards(tmp_path, text_tokens=9).read(0)["encoder_hidden_states"]
    assert text.shape == (9, 8)
    assert torch.equal(text[:2], short.encoder_hidden_states)
    assert not text[2:].any()


def without_latent_shape(table):
    return table.drop_columns(["vae_latent_shape"])


def with_empty_text(table):
    column = table.schema.get_field_index("text_embedding_shape")
    return table.set_column(column, SCHEMA.field("text_embedding_shape"), [[None, [7, 8]]])


def with_unknown_dtype(table):
    column = table.schema.get_field_index("vae_latent_dtype")
    return table.set_column(column, SCHEMA.field("vae_latent_dtype"), [["float17", "float17"]])


def with_wrong_length(table):
    column = table.schema.get_field_index("vae_latent_dtype")
    return table.set_column(column, SCHEMA.field("vae_latent_dtype"), [["float16", "float16"]])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (without_latent_shape, r"data\.parquet has no column vae_latent_shape; write shards in FastVideo's t2v schema"),
        (with_empty_text, r"clip 0 of .*data\.parquet has no text embedding of shape \[L, D\]; encode its caption"),
        (with_unknown_dtype, r"vae_latent_dtype 'float17' is not a torch dtype"),
        (with_wrong_length, r"vae_latent_bytes do not match the shape 4x3x6x5 in torch\.float16"),
    ],
)
def test_damaged_shards_are_one_line(tmp_path, damage, line):
    (path,) = write_latents(tmp_path / "good", make_clips(2))
    (tmp_path / "bad").mkdir()
    pq.write_table(damage(pq.read_table(path)), tmp_path / "bad" / "data.parquet")
    with pytest.raises(UserError, match=line) as error:
        open_latents(tmp_path / "bad").example(0)
    assert "\n" not in str(error.value)


def test_mixed_shapes_are_refused(tmp_path):
    write_latents(tmp_path, [*make_clips(2), *make_clips(1, latent=(4, 2, 6, 5))], clips_per_shard=2)
    with pytest.raises(
        UserError, match=r"clip 0 of .*shard-00001\.parquet has latents of 4x2x6x5, the first clip has 4x3"
    ):
        LatentShards(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.parquet shards in"):
        open_latents(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path):
    (path,) = write_latents(tmp_path, make_clips(2))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read .*shard-00000\.parquet: .*; if it is truncated"):
        open_latents(tmp_path)


def test_heldout_must_leave_something(tmp_path):
    write_latents(tmp_path, make_clips(3))
    with pytest.raises(UserError, match=r"holds 3 clips and heldout: 3 leaves none to train on; lower heldout"):
        open_latents(tmp_path, heldout=3)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kind": "latents"}, "kind latents needs folder"),
        ({"kind": "digits", "folder": "clips"}, "leave out folder, text_tokens and negative_embeds"),
        ({"kind": "digits", "clips": 3}, "Extra inputs are not permitted"),
    ],
)
def test_keys_must_fit_the_kind(settings, line):
    with pytest.raises(ValidationError, match=line):
        DataConfig(**settings)


def test_every_epoch_sees_every_clip_once_in_another_order():
    order = DataOrder(7, seed=0, stage_index=1)
    epochs = [[order.index(7 * epoch + place) for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [DataOrder(7, 0, 1).index(position) for position in range(7, 14)]
    assert epochs[0] != [DataOrder(7, 0, 2).index(position) for position in range(7)]


def test_processes_share_what_one_process_accumulates():
    order = DataOrder(None, seed=0, stage_index=0)
    one = list(MicroBatches(order, 3, grad_accumulation=2, processes=1, rank=0, first=1, last=3))
    ranks = [list(MicroBatches(order, 3, 1, processes=2, rank=rank, first=1, last=3)) for rank in (0, 1)]
    assert one == [batch for step in zip(*ranks, strict=True) for batch in step]
    assert one[0] == [6, 7, 8]
