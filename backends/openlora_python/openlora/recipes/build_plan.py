"""From a recipe to the commands that quantize a model, build an engine and launch it. Nothing runs here.

Flags were read in: examples/llm_ptq/hf_ptq.py of NVIDIA/Model-Optimizer (only those that its versions of 2025 and 2026
share), examples/quantization/quantize.py, tensorrt_llm/commands/build.py, tensorrt_llm/plugin/plugin.py (1.1 and 1.2)
and tensorrt_llm/llmapi/trtllm-llmapi-launch of NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from ..errors import InvalidArgument
from .deployment import SYSTEM_PYTHON, serve_settings
from .layout import Layout
from .planner import TOKENS_PER_BLOCK
from .recipe import Recipe

QUANTIZATION_FORMATS = {"none": "full_prec", "fp8": "fp8", "int8-weight-only": "int8_wo", "nvfp4": "nvfp4"}
FORWARDED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "NCCL_SOCKET_IFNAME", "HF_HUB_OFFLINE")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # models are on a disk: no rank asks a hub
HOST_WAIT_SECONDS = 1800


@dataclass(frozen=True)
class Step:
    """One command, or one file to write. `output` is made under a temporary name, and has its own when it is whole."""

    name: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[Path, ...] = ()
    output: Path | None = None
    text: str | None = None  # what `output` holds, if no command makes it

    def shell(self) -> str:
        """The step as a shell would take it."""
        if self.text is not None:
            return f"cat > {shlex.quote(str(self.output))} <<'EOF'\n{self.text}EOF"
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        line = " ".join([*words, shlex.join(self.command)])
        if self.output is None:
            return line
        return f"{line}\nmv {shlex.quote(str(partial_of(self.output)))} {shlex.quote(str(self.output))}"


def partial_of(output: Path) -> Path:
    """Where an output grows until it is whole."""
    return output.with_name(output.name + ".partial")


@dataclass(frozen=True)
class Tools:
    """Where NVIDIA's scripts are: the examples of TensorRT-LLM in the container, ModelOpt's where it was cloned."""

    python: str = SYSTEM_PYTHON
    trtllm_examples: Path = Path("/app/examples")
    modelopt: Path = Path("/opt/Model-Optimizer")


@dataclass(frozen=True)
class Cluster:
    """How ranks on several machines are started. `hosts`, the leader first, for mpirun; srun knows its own.

    `ssh_keys` holds `id_ed25519` and `known_hosts`; without it, ssh finds keys and hosts where the user has them.
    """

    scheduler: Literal["none", "mpi", "slurm"] = "none"
    hosts: tuple[str, ...] = ()
    ssh_port: int = 22
    ssh_keys: Path | None = None

    @property
    def ssh_options(self) -> str:
        options = f"-p {self.ssh_port} -o BatchMode=yes"
        if self.ssh_keys is None:
            return options
        keys = self.ssh_keys
        return f"{options} -i {keys}/id_ed25519 -o UserKnownHostsFile={keys}/known_hosts -o StrictHostKeyChecking=yes"


def quantize_steps(recipe: Recipe, layout: Layout, tools: Tools) -> list[Step]:
    """A checkpoint: Hugging Face's layout for the PyTorch path, TensorRT-LLM's own for the engine path. None if the
    path serves the model as it is."""
    if not recipe.needs_checkpoint:
        return []
    output = layout.checkpoint(recipe)
    make = _modelopt_command if recipe.target.path == "llm-api" else _trtllm_checkpoint_command
    command = make(recipe, layout, tools, partial_of(output))
    return [Step("quantize", command, inputs=(layout.base(recipe),), output=output)]


def _modelopt_command(recipe: Recipe, layout: Layout, tools: Tools, output: Path) -> tuple[str, ...]:
    calibration = recipe.calibration
    return (
        tools.python,
        str(tools.modelopt / "examples/llm_ptq/hf_ptq.py"),
        f"--pyt_ckpt_path={layout.base(recipe)}",
        f"--export_path={output}",
        f"--qformat={QUANTIZATION_FORMATS[recipe.precision.weights]}",
        f"--kv_cache_qformat={'none' if recipe.precision.kv_cache == 'auto' else recipe.precision.kv_cache}",
        f"--dataset={calibration.dataset}",
        f"--calib_size={calibration.samples}",
        f"--batch_size={calibration.batch}",
        f"--inference_tensor_parallel={recipe.parallel.tensor}",
        f"--inference_pipeline_parallel={recipe.parallel.pipeline}",
    )


def _trtllm_checkpoint_command(recipe: Recipe, layout: Layout, tools: Tools, output: Path) -> tuple[str, ...]:
    calibration, precision = recipe.calibration, recipe.precision
    kv_cache = () if precision.kv_cache == "auto" else (f"--kv_cache_dtype={precision.kv_cache}",)
    return (
        tools.python,
        str(tools.trtllm_examples / "quantization/quantize.py"),
        f"--model_dir={layout.base(recipe)}",
        f"--output_dir={output}",
        f"--dtype={precision.dtype}",
        f"--qformat={QUANTIZATION_FORMATS[precision.weights]}",
        *kv_cache,
        f"--calib_dataset={calibration.dataset}",
        f"--calib_size={calibration.samples}",
        f"--batch_size={calibration.batch}",
        f"--tp_size={recipe.parallel.tensor}",
        f"--pp_size={recipe.parallel.pipeline}",
    )


def engine_steps(recipe: Recipe, layout: Layout) -> list[Step]:
    """`trtllm-build`, of the engine path; rank and target modules are fixed by it.

    Raises:
        InvalidArgument: the recipe is of the other path.
    """
    if recipe.target.path != "engine":
        raise InvalidArgument(
            f"{recipe.name} serves its checkpoint: only recipes of path engine are built", field="path"
        )
    output = layout.engine(recipe)
    command = _build_command(recipe, layout, partial_of(output))
    return [Step("build", command, inputs=(layout.checkpoint(recipe),), output=output)]


def _build_command(recipe: Recipe, layout: Layout, output: Path) -> tuple[str, ...]:
    limits, lora, precision = recipe.limits, recipe.lora, recipe.precision
    fp8_attention = precision.weights == "fp8" and precision.kv_cache == "fp8"
    return (
        "trtllm-build",
        f"--checkpoint_dir={layout.checkpoint(recipe)}",
        f"--output_dir={output}",
        f"--workers={min(recipe.parallel.world, recipe.target.gpus_per_node)}",
        f"--max_batch_size={limits.max_batch_size}",
        f"--max_input_len={limits.max_seq_len - 1}",
        f"--max_seq_len={limits.max_seq_len}",
        f"--max_num_tokens={limits.max_num_tokens}",
        "--max_beam_width=1",
        "--kv_cache_type=paged",
        f"--tokens_per_block={TOKENS_PER_BLOCK}",
        "--remove_input_padding=enable",
        "--context_fmha=enable",
        "--use_paged_context_fmha=enable",  # chunked prefill and reuse of prefixes
        f"--use_fp8_context_fmha={'enable' if fp8_attention else 'disable'}",
        "--gpt_attention_plugin=auto",
        # The plugin is for 16-bit products; FP8's own need a flag and calibration of another kind (plugin.py).
        f"--gemm_plugin={'auto' if precision.weights == 'none' else 'disable'}",
        f"--lora_plugin={precision.dtype}",
        "--lora_target_modules",
        *lora.target_modules,
        f"--max_lora_rank={lora.max_rank}",
    )


def settings_step(recipe: Recipe, layout: Layout) -> Step:
    text = yaml.safe_dump(serve_settings(recipe, layout), sort_keys=False)
    return Step("settings", output=layout.settings(recipe), text=text)


def launch_steps(recipe: Recipe, layout: Layout, cluster: Cluster, openlora: str = "openlora") -> list[Step]:
    """Write the settings and start the server. On one machine the LLM API starts a rank a GPU by itself (MPI inside the
    container); on several, `trtllm-llmapi-launch` runs once a rank, and the server in the first one.

    Raises:
        InvalidArgument: the recipe's nodes and the cluster's don't agree.
    """
    settings = settings_step(recipe, layout)
    serve = (openlora, "serve", f"--config={settings.output}")
    nodes = -(-recipe.parallel.world // recipe.target.gpus_per_node)
    if cluster.scheduler == "none":
        if nodes > 1:
            raise InvalidArgument(f"{recipe.name} runs on {nodes} nodes: give --hosts, or --slurm", field="hosts")
        return [settings, Step("serve", serve, dict(ENVIRONMENT))]
    per_node = recipe.parallel.world // nodes
    if cluster.scheduler == "slurm":
        return [settings, Step("serve", (*_srun(nodes, per_node), "trtllm-llmapi-launch", *serve), dict(ENVIRONMENT))]
    if len(cluster.hosts) != nodes:
        raise InvalidArgument(
            f"{recipe.name} runs on {nodes} nodes, {len(cluster.hosts)} hosts are given", field="hosts"
        )
    wait = Step("wait-for-hosts", _wait_command(cluster))
    mpirun = _mpirun(cluster, recipe.parallel.world, per_node)
    return [settings, wait, Step("serve", (*mpirun, "trtllm-llmapi-launch", *serve), dict(ENVIRONMENT))]


def _srun(nodes: int, per_node: int) -> tuple[str, ...]:
    return ("srun", "--mpi=pmix", f"--nodes={nodes}", f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}")


def _mpirun(cluster: Cluster, world: int, per_node: int) -> tuple[str, ...]:
    places = ",".join(f"{host}:{per_node}" for host in cluster.hosts)
    forwarded = [word for name in FORWARDED for word in ("-x", name)]
    remote = ("--mca", "plm_rsh_args", cluster.ssh_options)
    return ("mpirun", "-np", str(world), "--host", places, "--map-by", f"ppr:{per_node}:node", *remote, *forwarded)


def _wait_command(cluster: Cluster) -> tuple[str, ...]:
    """Until the other machines let us in, or half an hour has passed."""
    asks = " && ".join(
        f"until ssh {cluster.ssh_options} {shlex.quote(host)} true; do sleep 2; done" for host in cluster.hosts[1:]
    )
    return ("timeout", str(HOST_WAIT_SECONDS), "bash", "-c", asks or "true")


def group_hosts(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the pods of a LeaderWorkerSet's group, the leader first.

    The controller sets LWS_LEADER_ADDRESS (`<leader>.<service>.<namespace>`) and LWS_GROUP_SIZE; worker i is
    `<leader>-i`.

    Raises:
        InvalidArgument: this is no pod of a group.
    """
    leader, size = environment.get("LWS_LEADER_ADDRESS"), environment.get("LWS_GROUP_SIZE", "")
    if not leader or not size.isdecimal():
        raise InvalidArgument("LWS_LEADER_ADDRESS and LWS_GROUP_SIZE are not set: give --hosts", field="hosts")
    name, _, rest = leader.partition(".")
    return (leader, *(f"{name}-{number}.{rest}" for number in range(1, int(size))))


def shell_script(steps: Sequence[Step]) -> str:
    """What `--dry-run` prints."""
    return "\n".join(step.shell() for step in steps)
