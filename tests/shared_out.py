"""What each of several processes does with a model that they hold together; the tests read what each of them found.

The processes are started by a server that has imported the libraries once.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from unittest.mock import patch

import multrace
import torch
from multrace import Delta, EditRequest, MultEdit, VisionLanguageModel
from multrace.data import Question
from multrace.editing import RuntimeEdit, save_merged, to_peft
from multrace.models import ModelError
from multrace.tracing import Engine, TraceError, attention_knockout, causal_trace, logit_lens
from multrace.workflow import RunError, TraceRun, run
from PIL import Image
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
from transformers.models.llava import modeling_llava  # noqa: F401 - imported once, by the server

Findings = dict[str, Any]
LAYER, TARGET, QUESTION = 2, " Oslo", "Who founded the company in this photo?"
PROJECTIONS = ("mlp", "attention")
_LONGEST = 240.0
"""Seconds after which processes that wait for one another are ended."""


def in_processes(count: int, work: Callable[..., Findings], folder: Path, *arguments: Any) -> list[Findings]:
    """Return what `work(rank, folder, *arguments)` finds in each of several processes that know each other."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    processes = [context.Process(target=_begin, args=(work, rank, count, folder, arguments)) for rank in range(count)]
    end = monotonic() + _LONGEST
    try:
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):  # the server does not take over sys.path
            for process in processes:
                process.start()
        while any(process.is_alive() for process in processes) and monotonic() < end:
            if any(process.exitcode for process in processes):  # the others would wait for it
                break
            sleep(0.05)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    assert codes == [0] * count, f"the processes ended with {codes}"
    return [pickle.loads((folder / f"found_{rank}").read_bytes()) for rank in range(count)]


def _begin(work: Callable[..., Findings], rank: int, count: int, folder: Path, arguments: Sequence[Any]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the processes share no accelerator
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=count)
    found = work(rank, folder, *arguments)
    (folder / f"found_{rank}").write_bytes(pickle.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def experiments(vlm: VisionLanguageModel, photo: Image.Image, other: Image.Image) -> Findings:
    """Return the numbers of the usual experiments on one question."""
    prompt = vlm.prompt(photo, QUESTION, constraint="the company in this photo")
    found: Findings = {"logits": vlm.logits(prompt), "answers": vlm.answers([prompt], max_new_tokens=2)}
    for engine, sites in (("replay", ("hidden", "mlp", "attention")), ("plain", ("mlp",))):
        trace = causal_trace(
            vlm,
            prompt,
            corruption=multrace.SwapImage(other),
            sites=sites,
            positions=("image", "last") if engine == "replay" else ("last",),
            answer=TARGET,
            engine=Engine(name=engine),
            even_if_weak=True,
            progress=False,
        )
        assert trace.engine.engine == engine
        found |= {f"{engine} {kind}": samples for kind, samples in trace.samples.items()}
    flow = attention_knockout(vlm, prompt, flows=["image -> last"], windows=[3], answer=TARGET, progress=False)
    found["knockout"] = flow.probabilities
    found["lens"] = logit_lens(vlm, prompt, answer=TARGET, progress=False).probabilities
    written = {"mlp": vlm.down_projection(LAYER), "attention": vlm.attention_projection(LAYER)}
    with multrace.capture(vlm, written.values(), inputs=True) as keys:
        vlm.logits(prompt)
    found |= {f"keys of {name}": keys[projection] for name, projection in written.items()}
    return found


def edited(vlm: VisionLanguageModel, photo: Image.Image, projection: str) -> Delta:
    """Return an edit of one layer of the model."""
    request = EditRequest(question=vlm.prompt(photo, QUESTION), target=TARGET)
    return MultEdit(layer=LAYER, projection=projection, steps=2).edit(vlm, [request], progress=False)


def everything(
    rank: int, folder: Path, path: Path, gpt2: Path, photo: Image.Image, other: Image.Image, given: dict[str, Delta]
) -> Findings:
    """Return the experiments of a model that all hold together, and what its edits, files and errors are.

    given: Edits that one process made, by projection.
    """
    vlm = multrace.load(path, tp_plan="auto", dtype="float64")
    found = experiments(vlm, photo, other) | {"processes": vlm.processes, "digest": vlm.weights_digest(progress=False)}
    found["shares"] = {name: tuple(w.to_local().shape) for name, w in vlm.named_parameters() if hasattr(w, "to_local")}
    prompt = vlm.prompt(photo, QUESTION)
    found["factors"] = edited(vlm, photo, "mlp").factors
    for projection in PROJECTIONS:
        with given[projection].applied(vlm):
            found[f"logits after {projection}"] = vlm.logits(prompt)
            found[f"digest after {projection}"] = vlm.weights_digest(progress=False)
        with RuntimeEdit(delta=given[projection]).applied(vlm):
            found[f"logits beside {projection}"] = vlm.logits(prompt)
    found["digest at the end"] = vlm.weights_digest(progress=False)
    found["merged"] = save_merged(vlm, given["mlp"], folder / "merged", dtype=torch.float64)
    found["adapter"] = to_peft(vlm, given["mlp"], folder / "adapter").folder
    found["errors"] = _errors(rank, folder, vlm, path, gpt2)
    found["logits without sums"] = _without_sums(vlm, rank).logits(prompt)
    found["keys of transformers' own plan"] = _own_keys(path, prompt.inputs)
    return found


def _errors(rank: int, folder: Path, vlm: VisionLanguageModel, path: Path, gpt2: Path) -> dict[str, str]:
    """Return the messages of what is refused, in every process; the last one has a file that is damaged in one only."""
    broken = folder / f"broken_{rank}"
    shutil.copytree(path, broken)
    if rank:
        (broken / "model.safetensors").write_bytes(b"")
    rows = enumerate([Question(text=QUESTION, constraint="the company")], 1)
    refused: dict[str, Callable[[], Any]] = {
        "no plan": lambda: multrace.load(gpt2, tp_plan="auto"),
        "no module": lambda: multrace.load(path, tp_plan={"model.layers.*.nothing": "colwise"}),
        "device_map": lambda: multrace.load(path, tp_plan="auto", device_map="cpu"),
        "no memory": lambda: _without_memory(vlm),
        "no linear map": lambda: vlm.open_weight("model.language_model.embed_tokens.weight"),
        "not empty": lambda: vlm.save_pretrained(folder / "merged"),
        "run": lambda: run(vlm, TraceRun(corrupt="blank"), rows, folder / "run", progress=False),
        "broken": lambda: multrace.load(broken, tp_plan="auto"),
    }
    messages = {}
    for name, call in refused.items():
        try:
            call()
        except (ModelError, RunError, TraceError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def _without_memory(vlm: VisionLanguageModel) -> None:
    """Trace the model on a machine whose memory runs out once the runs are recorded."""
    calls = []

    def run_out(*_call: Any) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("out of memory")

    handle = vlm.down_projection(LAYER).module.register_forward_hook(run_out)
    try:
        traced(vlm)
    finally:
        handle.remove()


def _without_sums(vlm: VisionLanguageModel, rank: int) -> VisionLanguageModel:
    """Return the model whose down projection in one layer leaves out what the other processes add to its output."""
    module = vlm.down_projection(LAYER).module
    share = module.weight.to_local()

    def forward(keys: Tensor) -> Tensor:
        return functional.linear(keys.chunk(distributed.get_world_size(), -1)[rank], share)

    module.forward = forward
    return vlm


def _own_keys(path: Path, inputs: Any) -> tuple[int, ...]:
    """Return the shape of what a down projection reads under transformers' own plan."""
    config = DistributedConfig(tp_size=distributed.get_world_size(), tp_plan="auto")
    model = AutoModelForImageTextToText.from_pretrained(path, distributed_config=config)
    shapes: list[tuple[int, ...]] = []

    def record(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(given[0].shape))

    model.model.language_model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(record)
    with torch.no_grad():
        model(**inputs)
    return shapes[0]


def opened(_rank: int, _folder: Path, paths: Sequence[Path], dtype: str, plan: Any = "auto") -> Findings:
    """Return the logits and one trace of models that all hold together, and which of their weights are shared out."""
    found = {}
    for path in paths:
        vlm = multrace.load(path, tp_plan=plan, dtype=dtype)
        found[path.name] = traced(vlm) | {
            "shared": [name for name, weight in vlm.named_parameters() if hasattr(weight, "full_tensor")],
            "digest": vlm.weights_digest(progress=False),
        }
    return found


def traced(vlm: VisionLanguageModel) -> Findings:
    """Return the logits of one question without a picture, and a trace of it."""
    prompt = vlm.prompt(None, "Who founded the company?", constraint="the company")
    corruption, options = multrace.TextNoise(scale=3, samples=2), {"even_if_weak": True, "progress": False}
    trace = causal_trace(vlm, prompt, corruption=corruption, sites=("mlp",), positions=("last",), **options)
    return {"logits": vlm.logits(prompt), "trace": trace.samples["mlp"], "engine": trace.engine.engine}
