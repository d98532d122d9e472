"""Conversion between checkpoint formats: exact there and back, names and files of each code base, clear refusals."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SELF_DECODERS, tiny_model

from yoco_ext import YOCOForCausalLM
from yoco_ext.checkpoint import load_checkpoint
from yoco_ext.cli import main
from yoco_ext.config import CHECKPOINT_FORMATS
from yoco_ext.convert import convert_checkpoint

both_decoders = pytest.mark.parametrize("self_decoder", SELF_DECODERS)


def same_weights(a: YOCOForCausalLM, b: YOCOForCausalLM) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left)


def model_for(formats: tuple[str, ...], self_decoder: str, dtype: torch.dtype) -> YOCOForCausalLM:
    """A model that every one of these formats can express."""
    swa = self_decoder == "sliding_window"
    overrides = {"num_self_heads": 4, "num_self_kv_heads": 2} if swa and "unilm" not in formats else {}
    if swa and "fla" in formats:
        overrides["self_rope"] = "standard"
    if not swa:
        overrides["window_size"] = 1024  # the default: not a field of a model that has no windows elsewhere
    return tiny_model(self_decoder, "reference", dtype, **overrides)


@both_decoders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CHECKPOINT_FORMATS, 2)))
def test_there_and_back_is_exact(
    first: str, second: str, self_decoder: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if {first, second} == {"unilm", "fla"} and self_decoder == "sliding_window":
        return  # no common rotary embedding in the window layers: test_what_cannot_be_expressed_is_named
    model = model_for((first, second), self_decoder, dtype)
    model.save(tmp_path / "yoco")
    here, there, back = tmp_path / "yoco", tmp_path / "there", tmp_path / "back"
    if first != "yoco":
        here = tmp_path / "here"
        assert convert_checkpoint(tmp_path / "yoco", here, to=first) == "yoco"
    assert convert_checkpoint(here, there, to=second) == first
    assert convert_checkpoint(there, back, to=first, source_format=second) == second
    for folder in (here, there, back):
        loaded = load_checkpoint(folder, ops="reference")
        same_weights(model, loaded)
        assert loaded.config == model.config
    for path in here.iterdir():
        ours = (back / path.name).read_bytes()
        if path.suffix == ".json":
            assert json.loads(ours) == json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            a, b = load_file(path), load_file(back / path.name)
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_files_of_each_code_base(tmp_path: Path) -> None:
    model = tiny_model(ops="reference")
    model.save(tmp_path / "yoco")
    for name in ("unilm", "fla", "hf"):
        convert_checkpoint(tmp_path / "yoco", tmp_path / name, to=name)
    params = json.loads((tmp_path / "unilm" / "params.json").read_text())
    assert params["n_self_heads"] == 2 and params["n_attn_kv_heads"] == 2 and params["sliding_window"] is None
    official = torch.load(tmp_path / "unilm" / "model.pt", weights_only=True)
    assert official.keys() == model.state_dict().keys()
    fla = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert fla["model_type"] == "yoco" and fla["self_decoder_attn"]["rope_inv_freq"] == "yoco"
    assert "model.self_layers.0.attn.gk_proj.weight" in load_file(tmp_path / "fla" / "model.safetensors")
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert hf["model_type"] == "yoco_ext" and hf["tie_word_embeddings"] is False
    assert load_checkpoint(tmp_path / "hf", ops="reference").config == model.config


@pytest.mark.parametrize("to", CHECKPOINT_FORMATS)
def test_tied_embeddings(to: str, tmp_path: Path) -> None:
    model = tiny_model(ops="reference", tie_embeddings=True)
    model.save(tmp_path / "tied")
    target = tmp_path / "target"
    convert_checkpoint(tmp_path / "tied", target, to=to)
    loaded = load_checkpoint(target, ops="reference")
    same_weights(model, loaded)
    assert loaded.config.tie_embeddings == (to != "unilm")
    if to not in ("unilm", "yoco"):
        assert not any(
            name.endswith(("output_projection.weight", "lm_head.weight"))
            for name in load_file(target / "model.safetensors")
        )


def test_shards_and_prefixes_are_read(tmp_path: Path) -> None:
    model = tiny_model(ops="reference")
    model.save(tmp_path / "whole")
    weights = list(load_file(tmp_path / "whole" / "model.safetensors").items())
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    shards = {"model-00001-of-00002.safetensors": weights[::2], "model-00002-of-00002.safetensors": weights[1::2]}
    for name, part in shards.items():
        save_file({f"decoder.model.{key}": tensor for key, tensor in part}, folder / name)
    index = {f"decoder.model.{key}": name for name, part in shards.items() for key, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    convert_checkpoint(folder, tmp_path / "out", to="fla")
    same_weights(model, load_checkpoint(tmp_path / "out", ops="reference"))


def test_what_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    for number, (to, overrides, message) in enumerate(
        [
            ("unilm", {"self_rope": "standard"}, r"official code has no self_rope='standard' \(it has 'official'\)"),
            ("unilm", {"num_self_layers": 1}, "num_self_layers=1"),
            ("unilm", {"gate_logit_normalizer": 8.0}, "gate_logit_normalizer=8.0"),
            ("fla", {"cross_rope": "none"}, "fla has no cross_rope='none'"),
            ("fla", {"scale_embeddings": False}, "scale_embeddings=False"),
            ("fla", {"self_decoder": "sliding_window"}, "fla has no self_rope='official'"),
        ]
    ):
        source = tmp_path / str(number)
        tiny_model(ops="reference", **overrides).save(source)
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "target", to=to)
        assert not (tmp_path / "target").exists()


def installed(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} (requirements-compat.txt) is not installed"
    )


@installed("transformers")
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_and_saves_what_was_converted(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from yoco_ext.compat import hf

    hf.install()
    model = tiny_model(ops="reference", tie_embeddings=tied)
    model.save(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="hf")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert isinstance(theirs, hf.YOCOExtForCausalLM) and not any(loading.values()), loading
    theirs.save_pretrained(tmp_path / "saved")
    convert_checkpoint(tmp_path / "saved", tmp_path / "back", to="yoco", source_format="hf")
    back = load_checkpoint(tmp_path / "back", ops="reference")
    same_weights(model, back)
    assert back.config == model.config


@installed("fla")
def test_fla_loads_and_saves_what_was_converted(tmp_path: Path) -> None:
    from fla.models.yoco import YOCOForCausalLM as TheirModel

    model = tiny_model(ops="reference", window_size=1024)
    model.save(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="fla")
    theirs, loading = TheirModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(loading.values()), loading
    theirs.save_pretrained(tmp_path / "saved")
    convert_checkpoint(tmp_path / "saved", tmp_path / "back", to="yoco", source_format="fla")
    back = load_checkpoint(tmp_path / "back", ops="reference")
    same_weights(model, back)
    assert back.config == model.config


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(ops="reference")
    model.save(tmp_path / "a")
    names = [str(tmp_path / name) for name in "abc"]
    assert main(["convert", names[0], names[1], "--from", "yoco", "--to", "unilm"]) == 0
    assert "(unilm)" in capsys.readouterr().out
    assert main(["convert", names[1], names[2], "--to", "hf"]) == 0
    same_weights(model, load_checkpoint(names[2], ops="reference"))
    for arguments, message in (
        ((names[1], names[2], "--to", "hf"), "is there already: name another folder"),
        ((names[1], names[2] + "x", "--from", "fla", "--to", "hf"), "in the format unilm, not fla"),
        ((names[0] + "x", names[2], "--to", "hf"), "is not a folder"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_unsafe_pickles_are_refused(tmp_path: Path) -> None:
    tiny_model(ops="reference").save(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="unilm")
    torch.save({"embed_tokens.weight": Path("/")}, tmp_path / "b" / "model.pt")  # pickles more than tensors
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        convert_checkpoint(tmp_path / "b", tmp_path / "c", to="yoco")
