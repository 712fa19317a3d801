"""What the plugin takes hold of in vLLM, looked up in its source: importing a GPU's vLLM needs a GPU's libraries.

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-*.whl 'vllm/*' -d source
    python tests/integrations/vllm_engine/hooks.py source

Prints every name that is missing or has other arguments, and ends with status 1 if there are any. How a name behaves
is not looked at: that takes the tests of this folder, or `benchmarks/vllm_checks.py` on a GPU.
"""

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import turboattention.integrations.vllm.settings as plugin

BACKEND, CONFIG = "vllm.v1.attention.backend", "vllm.config"
SIGNATURES = {
    f"{BACKEND}:AttentionImpl.forward":
        "layer query key value kv_cache attn_metadata output output_scale output_block_scale",
    f"{BACKEND}:AttentionImpl.__init__":
        "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap attn_type "
        "kv_sharing_target_layer_name",
    f"{BACKEND}:AttentionMetadataBuilder.__init__": "kv_cache_spec layer_names vllm_config device",
    f"{BACKEND}:AttentionMetadataBuilder.build": "common_prefix_len common_attn_metadata fast_build",
    f"{BACKEND}:AttentionMetadataBuilder.build_for_cudagraph_capture": "common_attn_metadata",
    f"{BACKEND}:AttentionMetadataBuilder.get_cudagraph_support": "vllm_config kv_cache_spec",
    f"{BACKEND}:AttentionBackend.customize_spec": "spec",
    f"{BACKEND}:AttentionBackend.get_supported_kernel_block_sizes": "kv_cache_spec",
    f"{CONFIG}:get_layers_from_vllm_config": "vllm_config layer_type layer_names",
}  # fmt: skip
# Names of which the plugin passes some arguments: these must be among theirs.
ARGUMENTS = {
    f"{BACKEND}:AttentionMetadataBuilder._init_reorder_batch_threshold":
        "reorder_batch_threshold supports_spec_as_decode",
    f"{BACKEND}:AttentionBackend.validate_configuration": "kv_cache_dtype has_sliding_window",
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path",
    "vllm.v1.attention.backends.fa_utils:get_flash_attn_version": "head_size",
}  # fmt: skip
GPU_ALONE = {"vllm.config.cache:register_kv_cache_dtype": "name"}  # since 0.33
MEMBERS = {
    f"{BACKEND}:CommonAttentionMetadata":
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs num_actual_tokens "
        "block_table_tensor req_idx is_prefilling slot_mapping",
    f"{BACKEND}:AttentionCGSupport": "ALWAYS UNIFORM_BATCH UNIFORM_SINGLE_TOKEN_DECODE NEVER",
    f"{BACKEND}:AttentionType": "DECODER",
    f"{BACKEND}:AttentionBackend":
        "forward_includes_kv_cache_update supported_dtypes supported_kv_cache_dtypes get_name get_impl_cls "
        "get_builder_cls get_supported_head_sizes supported_kv_cache_layouts supports_kv_connector",
    "vllm.v1.kv_cache_interface:AttentionSpec":
        "block_size num_kv_heads head_size dtype kv_quant_mode state_content_bytes",
    "vllm.v1.kv_cache_interface:KVCacheLayout": "LBHNC",
    "vllm.v1.kv_cache_interface:KVQuantMode": "NONE",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": "CPU_ATTN FLASH_ATTN",
    "vllm.model_executor.layers.attention:Attention":
        "num_kv_heads head_size head_size_v kv_cache sliding_window kv_sharing_target_layer_name impl layer_name",
    f"{CONFIG}:VllmConfig":
        "cache_config additional_config speculative_config parallel_config scheduler_config model_config "
        "compilation_config use_v2_model_runner",
    f"{CONFIG}:CacheConfig": "cache_dtype kv_cache_dtype_skip_layers num_gpu_blocks",
    f"{CONFIG}:SchedulerConfig": "max_num_seqs",
    f"{CONFIG}:SpeculativeConfig": "method num_speculative_tokens",
    f"{CONFIG}:ParallelConfig": "rank tensor_parallel_size",
    f"{CONFIG}:ModelConfig": "hf_text_config get_total_num_kv_heads get_head_size",
    f"{CONFIG}:CompilationConfig": "static_forward_context",
}  # fmt: skip
# Abstract methods that ours answer; one more would keep them from being made.
ABSTRACT = {
    f"{BACKEND}:AttentionBackend": "get_name get_impl_cls get_builder_cls",
    f"{BACKEND}:AttentionImpl": "__init__ forward",
    f"{BACKEND}:AttentionMetadataBuilder": "__init__ build",
}


class Source:
    """The package ``vllm`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = lru_cache(maxsize=None)(self._module)

    def _module(self, name: str) -> tuple[ast.Module, str]:
        """A module and the package that its relative imports begin in."""
        path = self.folder / name.replace(".", "/")
        if path.is_dir():
            return ast.parse((path / "__init__.py").read_text()), name
        return ast.parse(path.with_suffix(".py").read_text()), name.rpartition(".")[0]

    def find(self, module: str, name: str) -> tuple[ast.AST, str] | None:
        """Where a name of a module is defined, imports followed; None where it is not."""
        try:
            tree, package = self.module(module)
        except OSError:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node, module
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node, module
            if isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = package.split(".")
                    base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
                for alias in node.names:
                    if (alias.asname or alias.name) == name and base.startswith("vllm"):
                        return self.find(base, alias.name)
        if (self.folder / f"{module}.{name}".replace(".", "/")).with_suffix(".py").exists():
            return tree, f"{module}.{name}"  # a module of a package
        return None

    def bodies(self, place: str) -> Iterator[ast.ClassDef]:
        """A class and those of vLLM that it inherits from."""
        found = self.find(*place.split(":"))
        if found is None or not isinstance(found[0], ast.ClassDef):
            return
        yield found[0]
        for base in found[0].bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                yield from self.bodies(f"{found[1]}:{base.id}")

    def members(self, place: str) -> set[str]:
        """Methods, fields, and what methods set of ``self``."""
        names = set()
        for body in self.bodies(place):
            for node in ast.walk(body):
                if isinstance(node, ast.FunctionDef):
                    names.add(node.name)
                for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
                    if isinstance(target, ast.Name):
                        names.add(target.id)
                    elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                        names.add(target.attr)
        return names

    def arguments(self, place: str) -> list[str] | None:
        """Of a function or a method, without ``self`` and ``cls``."""
        module, _, name = place.partition(":")
        owner, _, method = name.partition(".")
        if method:
            functions = (x for body in self.bodies(f"{module}:{owner}") for x in body.body)
            node = next((x for x in functions if isinstance(x, ast.FunctionDef) and x.name == method), None)
        else:
            found = self.find(module, owner)
            node = found[0] if found is not None and isinstance(found[0], ast.FunctionDef) else None
        if node is None:
            return None
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return [x.arg for x in given if x.arg not in ("self", "cls")]

    def abstract(self, place: str) -> set[str]:
        """Methods that a class must have and neither it nor those between define."""
        wanted: set[str] = set()
        for body in reversed(list(self.bodies(place))):
            for node in body.body:
                if isinstance(node, ast.FunctionDef):
                    marks = {x.id for x in node.decorator_list if isinstance(x, ast.Name)}
                    (wanted.add if "abstractmethod" in marks else wanted.discard)(node.name)
        return wanted


def imported() -> Iterator[tuple[str, str]]:
    """Every name that a module of the plugin imports from vLLM."""
    for file in sorted(Path(plugin.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((str(node.module), alias.name) for alias in node.names)


def differences(folder: Path, gpu: bool = True) -> list[str]:
    """What a source lacks; gpu: also what the plugin needs for GPUs alone."""
    source, found = Source(folder), []
    for module, name in sorted(set(imported())):
        if source.find(module, name) is None:
            found.append(f"{module}: no {name}")
    for place, expected in SIGNATURES.items():
        if source.arguments(place) != expected.split():
            found.append(f"{place}: expected arguments {expected.split()}, received {source.arguments(place)}")
    for place, expected in {**ARGUMENTS, **(GPU_ALONE if gpu else {})}.items():
        missing = set(expected.split()) - set(source.arguments(place) or ())
        found += [f"{place}: no argument {name}" for name in sorted(missing)]
    for place, expected in MEMBERS.items():
        found += [f"{place}: no {name}" for name in sorted(set(expected.split()) - source.members(place))]
    for place, expected in ABSTRACT.items():
        more = source.abstract(place) - set(expected.split())
        found += [f"{place}: a new abstract method {name}" for name in sorted(more)]
    return found


if __name__ == "__main__":
    lacking = differences(Path(sys.argv[1]))
    print("\n".join(lacking) or "nothing is missing")
    sys.exit(bool(lacking))
