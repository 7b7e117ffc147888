"""A bundle with plans that the stand-in of TensorRT runs, made of one without any."""

import json
import shutil
from pathlib import Path

from fake.tensorrt import VERSION, write_plan

from framesink.build.plans.profiles import language_model_profiles, vision_profiles
from framesink.runtime.bundle import Bundle, hash_file
from framesink.runtime.manifest import PART_NAMES, Manifest, PartName, PlanSpec


def plan_spec(
    manifest: Manifest, part: PartName, builder: str = "tensorrt_rtx", sm: str = "sm89"
) -> PlanSpec:
    """The plan of a part's executed graph, with the profiles that a build gives it."""
    graph = manifest.part(part).executed
    profiles = (
        language_model_profiles(graph.inputs, manifest.limits, manifest.page_size)
        if part == "language_model"
        else vision_profiles(
            graph.inputs, manifest.limits, manifest.model.vision, manifest.preprocess
        )
    )
    return PlanSpec.model_validate(
        {
            "path": f"plans/{part}.{builder}.{sm}.plan",
            "builder": builder,
            "builder_version": VERSION,
            "targets": (sm,),
            "compute_type": graph.compute_type,
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "profiles": profiles,
        }
    )


def add_plans(bundle: Path, directory: Path, builder: str = "tensorrt_rtx") -> Path:
    """A copy of a bundle in `directory` that has a plan of each part, for sm89."""
    shutil.copytree(bundle, directory)
    manifest = Bundle.open(bundle, check="sizes").manifest
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    for part in PART_NAMES:
        spec = plan_spec(manifest, part, builder)
        plan = directory / spec.path
        write_plan(plan, directory / manifest.part(part).executed.path, spec)
        content[part]["plans"] = [spec.model_dump(mode="json")]
        content["files"][spec.path] = {"size": plan.stat().st_size, "sha256": hash_file(plan)}
    path.write_text(json.dumps(content))
    return directory
