"""Law 7 on real checkpoints: what is exported loads with plain transformers and computes what was trained."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_dist.config import Run
from qwen_dist.data.cache.prepare import open_prepared
from qwen_dist.errors import RunFailed, UserError
from qwen_dist.export import export as export_module
from qwen_dist.export.__main__ import main
from qwen_dist.export.export import export
from qwen_dist.run_dir import RunDir
from qwen_dist.serve.chat import run_chat
from tests.export.conftest import train

pytestmark = pytest.mark.distributed
DENSE = ["full zero2", "full zero3", "lora zero2", "lora zero3"]
STOP_ID, PAD_ID = 258, 256  # of the tiny tokenizer


def trained_eval_loss(run_dir: RunDir) -> float:
    """The held-out loss that the trainer measured after its last step."""
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def exported_eval_loss(run_dir: RunDir, model: torch.nn.Module) -> float:
    """The same loss by plain transformers, one sample after the other."""
    record = json.loads(run_dir.run_json.read_text())
    held_out = open_prepared(Run.model_validate(record["config"]), record["data"]["eval"])
    nll_sum, num_supervised = 0.0, 0
    for index in range(held_out.num_samples):
        ids_T, labels_T = (torch.tensor(array, dtype=torch.long) for array in held_out.sample(index))
        with torch.inference_mode():
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        nll_sum += float(torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], reduction="sum"))
        num_supervised += int((labels_T != -100).sum())
    return nll_sum / num_supervised


@pytest.mark.parametrize("kind", [*DENSE, "qlora zero2", "variants zero3", "moe"])
def test_the_export_has_the_loss_that_the_trainer_measured(trained, kind):
    folder, record = export(trained(kind).path, None, False, None)
    is_fp32 = kind.endswith("zero3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == (torch.float32 if is_fp32 else torch.bfloat16)
    untrained = AutoModelForCausalLM.from_config(model.config)
    loss, expected = exported_eval_loss(trained(kind), model), trained_eval_loss(trained(kind))
    assert loss == pytest.approx(expected, rel=1e-5 if is_fp32 else 1e-2)
    assert abs(exported_eval_loss(trained(kind), untrained) - expected) > 0.1  # else any weights would do

    verified = record["verified"]
    assert record["step"] == 4 and verified["sample"] == "training sample 0"
    assert verified["tensors_bit_for_bit"] == len(model.state_dict())
    if "lora" in kind or "variants" in kind:
        assert verified["adapter_effect"] > 10 * verified["logits_relative_error"]
    else:
        assert verified["logits_max_abs_difference"] == 0


def test_an_earlier_step_is_exported_on_demand(trained, tmp_path):
    losses = [json.loads(line) for line in trained("full zero3").metrics.read_text().splitlines()]
    at_step_2 = next(line["eval_loss"] for line in losses if "eval_loss" in line and line["step"] == 2)
    folder, record = export(trained("full zero3").path, 2, False, tmp_path / "step2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert record["step"] == 2
    assert exported_eval_loss(trained("full zero3"), model) == pytest.approx(at_step_2, rel=1e-5)


def test_adapters_are_not_merged_into_other_weights(trained, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(trained("lora zero2").path, path)
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "base_weights": "0" * 32}))
    with pytest.raises(UserError, match=r"The weights in model\.path=.* have changed since .*run was started"):
        export(path, None, False, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_rounds_once(trained):
    """Against the formula by hand, from the adapters as peft saves them."""
    run_dir = trained("lora zero2")
    merged, _ = export(run_dir.path, None, False, None)
    adapter, _ = export(run_dir.path, None, True, None)
    base = AutoModelForCausalLM.from_pretrained(run_dir.path.parents[1] / "base").state_dict()
    found = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    saved = load_file(adapter / "adapter_model.safetensors")
    lora = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    layers = sorted({name.rpartition(".lora_")[0] for name in lora})
    assert len(layers) == 14
    for name in base:
        expected = base[name]
        layer = name.removesuffix(".weight")
        if layer in layers:
            delta = lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"] * (12 / 4)
            expected = (expected.float() + delta).to(expected.dtype)
            assert not torch.equal(expected, base[name])
        assert torch.equal(found[name], expected), name


def test_stop_tokens_come_out_right_from_a_base_model(trained):
    folder, _ = export(trained("full zero2").path, None, False, None)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [STOP_ID, PAD_ID]
    assert (generation["pad_token_id"], generation["do_sample"]) == (PAD_ID, True)
    assert (generation["temperature"], generation["top_p"], generation["top_k"]) == (0.7, 0.8, 20)
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["use_cache"], config["dtype"]) == (STOP_ID, True, "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    template = (trained("full zero2").path.parents[1] / "base" / "chat_template.jinja").read_text()
    assert tokenizer.chat_template == template


def test_experts_have_the_hubs_names_on_disk(trained):
    folder, _ = export(trained("moe").path, None, False, None)
    names = load_file(folder / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert not any("gate_up" in name for name in names)


def test_tied_embeddings_are_saved_once(trained):
    folder, _ = export(trained("full zero2").path, None, False, None)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_adapter_alone_loads_with_plain_peft(trained):
    run_dir = trained("lora zero2")
    folder, record = export(run_dir.path, None, True, None)
    assert folder == run_dir.path / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        run_dir.path.parents[1] / "base"
    )
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert exported_eval_loss(run_dir, model) == pytest.approx(trained_eval_loss(run_dir), rel=1e-2)
    assert record["verified"]["tensors_bit_for_bit"] == 28


def test_pissas_adapter_alone_is_plain_lora_beside_the_published_weights(trained):
    run_dir = trained("variants zero3")
    folder, record = export(run_dir.path, None, True, None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12 * 2**0.5, True)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert exported_eval_loss(run_dir, model) == pytest.approx(trained_eval_loss(run_dir), rel=1e-5)
    assert record["verified"]["adapter_effect"] > 0.1 > 1e3 * record["verified"]["logits_relative_error"]


def test_a_run_with_every_variant_resumes_bit_for_bit(copied):
    """PiSSA's adapters fit only the weights that their own start was taken from."""
    run_dir = copied("variants zero3")
    shards = [run_dir.checkpoint(4) / f"rank_{rank}.safetensors" for rank in (0, 1)]
    expected, started = [shard.read_bytes() for shard in shards], run_dir.adapter_start.stat().st_mtime_ns
    shutil.rmtree(run_dir.checkpoint(4))
    train(run_dir, 2)
    assert [shard.read_bytes() for shard in shards] == expected
    assert run_dir.adapter_start.stat().st_mtime_ns == started


def test_pissas_start_must_be_there(copied):
    run_dir = copied("variants zero3")
    run_dir.adapter_start.unlink()
    with pytest.raises(RunFailed, match=r"adapter_start.safetensors is missing: .* bring it back, or train again"):
        export(run_dir.path, None, False, None)


def test_an_adapter_alone_must_be_loadable(trained):
    with pytest.raises(UserError, match=r"random weights .* leave --adapter-only out"):
        export(trained("lora zero3").path, None, True, None)
    with pytest.raises(UserError, match="trained every weight"):
        export(trained("full zero2").path, None, True, None)


def test_a_damaged_checkpoint_is_refused_and_the_newest_whole_one_named(copied):
    run_dir = copied("full zero3")
    shard = run_dir.checkpoint(4) / "rank_1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} has \d+ bytes, not \d+; give --step 2"):
        export(run_dir.path, None, False, None)
    (run_dir.checkpoint(2) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"step_00000002 is damaged: it has no manifest\.json"):
        export(run_dir.path, 2, False, None)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are 2, 4"):
        export(run_dir.path, 7, False, None)
    shutil.rmtree(run_dir.checkpoints)
    with pytest.raises(UserError, match="has no checkpoint"):
        export(run_dir.path, None, False, None)
    assert not run_dir.export.exists()


def test_a_damaged_checkpoint_of_the_right_size_is_one_sentence(copied, capsys):
    run_dir = copied("full zero3")
    shard = run_dir.checkpoint(4) / "rank_1.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert main([str(run_dir.path)]) == 2
    assert "step_00000004 is damaged: rank_1.safetensors has its size, but not its content" in capsys.readouterr().err
    assert not run_dir.export.exists()


def test_a_full_disk_leaves_the_old_export(copied, capsys):
    run_dir = copied("full zero3")
    assert main([str(run_dir.path), "--step", "2"]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes; the weights have 190,000
    try:
        assert main([str(run_dir.path), "--step", "4"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written: " in capsys.readouterr().err
    assert json.loads((run_dir.export / "qwen_dist.json").read_text())["step"] == 2


def test_only_our_own_export_is_replaced_and_only_by_a_verified_one(copied, tmp_path, monkeypatch):
    run_dir = copied("full zero3")
    export(run_dir.path, 2, False, None)
    before = (run_dir.export / "model.safetensors").read_bytes()

    def broken(folder: Path, *rest: object) -> None:
        raise RunFailed("as if verification had failed")

    with monkeypatch.context() as patch, pytest.raises(RunFailed):
        patch.setattr(export_module, "verify_model", broken)
        export(run_dir.path, 4, False, None)
    assert (run_dir.export / "model.safetensors").read_bytes() == before
    assert export(run_dir.path, 4, False, None)[1]["step"] == 4
    assert sorted(path.name for path in run_dir.path.glob("export*")) == ["export"]

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an export of run tiny"):
        export(run_dir.path, 4, False, theirs)
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]


def test_verification_sees_a_changed_weight_and_a_changed_tokenizer(copied, monkeypatch):
    run_dir = copied("full zero3")
    write_model, write_tokenizer = export_module.write_model, export_module.write_tokenizer

    def write_other_model(folder, model, *rest):
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-6
        write_model(folder, model, *rest)

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"1 tensors differ, .* model\.norm\.weight"):
        patch.setattr(export_module, "write_model", write_other_model)
        export(run_dir.path, None, False, None)

    def write_other_tokenizer(folder, tokenizer):
        write_tokenizer(folder, tokenizer)
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template.replace("\n\n</think>", "\n</think>"))

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match="enable_thinking=False differs"):
        patch.setattr(export_module, "write_tokenizer", write_other_tokenizer)
        export(run_dir.path, None, False, None)
    assert not run_dir.export.exists()


def test_without_the_prepared_data_a_built_in_conversation_is_compared(copied):
    run_dir = copied("full zero3")
    record = json.loads(run_dir.run_json.read_text())
    record["config"]["output_dir"] = str(run_dir.path / "elsewhere")
    run_dir.run_json.write_text(json.dumps(record))
    assert export(run_dir.path, None, False, None)[1]["verified"]["sample"] == "a built-in conversation"


def test_the_command_says_what_it_made_and_chat_takes_it(trained, capsys):
    run_dir = trained("lora zero3")
    assert main([str(run_dir.path)]) == 0
    said = capsys.readouterr().out
    assert f"exported step 4 of tiny to {run_dir.export}" in said
    assert "bit for bit" in said and f"qwen-dist chat {run_dir.path}" in said and f"vllm serve {run_dir.export}" in said
    assert main([str(run_dir.path), "--step", "9"]) == 2
    assert "no checkpoint of step 9" in capsys.readouterr().err
    assert run_chat(str(run_dir.path), ("1 + 1?",), None, None, True, 4, None, True) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "no_think"
