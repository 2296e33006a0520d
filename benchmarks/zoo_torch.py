"""Fold every architecture with a BatchNorm in the model zoos that are installed, with random statistics; a table.

    python -m benchmarks.zoo_torch [timm torchvision ...] [--only NAME] [--first N] [--out zoo.jsonl]

Zoos are imported lazily; one that is not installed is left out. The statistics are anchored to data (the running
moments of one random batch, then jittered) and about 30 % of the gammas are negative, so that a wrong fold shows. Each
folded model is compared with the original in float64, on an input it was not read with and another batch size where
the model takes one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnfold.torch import fold, run
from bnfold.torch.double import double
from bnfold.torch.stored import to_float64

Case = tuple[str, Callable[[], nn.Module], Any]


def _images(size: int, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


def timm_cases() -> Iterator[Case]:
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name, pretrained=False), "timm"


def torchvision_cases() -> Iterator[Case]:
    from torchvision import models

    for name in models.list_models():
        builder = lambda name=name: models.get_model(name, weights=None, **_torchvision_options(name))
        yield name, builder, "torchvision"


def _torchvision_options(name: str) -> dict[str, Any]:
    if any(
        part in name for part in ("rcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn", "lraspp", "keypoint")
    ):
        return {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        return {"init_weights": False}
    return {}


def pytorchcv_cases() -> Iterator[Case]:
    from pytorchcv.model_provider import _models, get_model

    for name in sorted(_models):
        yield name, lambda name=name: get_model(name, pretrained=False), "pytorchcv"


def smp_cases() -> Iterator[Case]:
    import segmentation_models_pytorch as smp

    for arch in (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "DeepLabV3Plus",
        "UPerNet",
    ):
        for encoder in (
            "resnet18",
            "vgg11_bn",
            "densenet121",
            "efficientnet-b0",
            "mobilenet_v2",
            "timm-regnetx_002",
        ):
            builder = lambda a=arch, e=encoder: getattr(smp, a)(encoder_name=e, encoder_weights=None)
            yield f"{arch}-{encoder}", builder, _images(64)


def monai_cases() -> Iterator[Case]:
    from monai.networks import nets

    volume = torch.randn(2, 1, 32, 32, 32)
    batch = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    yield (
        "UNet",
        lambda: nets.UNet(**batch, channels=(4, 8, 16), strides=(2, 2), num_res_units=2, norm="batch"),
        volume,
    )
    yield "BasicUNet", lambda: nets.BasicUNet(**batch, features=(4, 4, 8, 16, 32, 4), norm="batch"), volume
    yield "VNet", lambda: nets.VNet(3, 1, 2), torch.randn(1, 1, 32, 32, 32)
    yield "SegResNet", lambda: nets.SegResNet(3, 8, 1, 2, norm="batch"), volume
    yield "DenseNet121", lambda: nets.DenseNet121(3, 1, 2), torch.randn(2, 1, 64, 64, 64)
    yield "DynUNet", lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], norm_name="batch"), volume
    yield "AttentionUnet", lambda: nets.AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2)), volume
    yield "HighResNet", lambda: nets.HighResNet(2, 1, 2, norm_type="batch"), torch.randn(2, 1, 32, 32)
    yield "SENet154", lambda: nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=2), volume
    yield (
        "EfficientNetBN",
        lambda: nets.EfficientNetBN("efficientnet-b0", spatial_dims=2, in_channels=3),
        _images(64),
    )
    yield "ResNet18", lambda: nets.resnet18(spatial_dims=3, n_input_channels=1), volume
    yield (
        "BasicUNetPlusPlus",
        lambda: nets.BasicUNetPlusPlus(3, 1, 2, (4, 4, 8, 16, 32, 4), norm="batch"),
        volume,
    )
    yield "AHNet", lambda: nets.AHNet((64,) and (1,) * 4, 3, 1, 2), torch.randn(1, 1, 64, 64, 64)
    yield "TorchVisionFCModel", lambda: nets.TorchVisionFCModel("resnet18", num_classes=2), _images(64)
    yield "FlexibleUNet", lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0", norm=("batch", {})), _images(64)


def transformers_cases() -> Iterator[Case]:
    import transformers as t

    pixels = {"pixel_values": _images(224)}
    small = {"pixel_values": _images(64)}
    yield "ResNet", lambda: t.ResNetForImageClassification(t.ResNetConfig()), small
    yield "RegNet", lambda: t.RegNetForImageClassification(t.RegNetConfig()), small
    yield "MobileNetV1", lambda: t.MobileNetV1ForImageClassification(t.MobileNetV1Config()), small
    yield "MobileNetV2", lambda: t.MobileNetV2ForImageClassification(t.MobileNetV2Config()), small
    yield "MobileNetV2Seg", lambda: t.MobileNetV2ForSemanticSegmentation(t.MobileNetV2Config()), small
    yield "EfficientNet", lambda: t.EfficientNetForImageClassification(t.EfficientNetConfig()), small
    yield "LeViT", lambda: t.LevitForImageClassification(t.LevitConfig()), pixels
    yield (
        "MobileViT",
        lambda: t.MobileViTForImageClassification(t.MobileViTConfig()),
        {"pixel_values": _images(256)},
    )
    yield (
        "MobileViTV2",
        lambda: t.MobileViTV2ForImageClassification(t.MobileViTV2Config()),
        {"pixel_values": _images(256)},
    )
    yield "PoolFormer", lambda: t.PoolFormerForImageClassification(t.PoolFormerConfig()), pixels
    yield "CvT", lambda: t.CvtForImageClassification(t.CvtConfig()), pixels
    yield "SegFormer", lambda: t.SegformerForSemanticSegmentation(t.SegformerConfig()), small
    yield (
        "UperNet",
        lambda: t.UperNetForSemanticSegmentation(
            t.UperNetConfig(
                backbone_config=t.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"]),
                hidden_size=32,
            )
        ),
        small,
    )
    yield "SwiftFormer", lambda: t.SwiftFormerForImageClassification(t.SwiftFormerConfig()), pixels
    yield (
        "TimmBackbone",
        lambda: t.DetrForObjectDetection(
            t.DetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=t.ResNetConfig(out_features=["stage4"]),
            )
        ),
        small,
    )
    yield (
        "RTDetr",
        lambda: t.RTDetrForObjectDetection(t.RTDetrConfig()),
        {"pixel_values": _images(640, batch=1)},
    )
    yield (
        "Conformer",
        lambda: t.Wav2Vec2ConformerModel(t.Wav2Vec2ConformerConfig(num_hidden_layers=2)),
        {"input_values": torch.randn(2, 8000)},
    )
    yield (
        "Wav2Vec2Bert",
        lambda: t.Wav2Vec2BertModel(t.Wav2Vec2BertConfig(num_hidden_layers=2)),
        {"input_features": torch.randn(2, 50, 160)},
    )
    yield (
        "SeamlessM4Tv2Vocoder",
        lambda: t.FastSpeech2ConformerModel(t.FastSpeech2ConformerConfig()),
        {"input_ids": torch.randint(0, 70, (1, 9))},
    )
    yield "PatchTST", lambda: t.PatchTSTModel(t.PatchTSTConfig()), {"past_values": torch.randn(2, 32, 1)}
    yield (
        "PatchTSMixer",
        lambda: t.PatchTSMixerModel(t.PatchTSMixerConfig(norm_mlp="BatchNorm")),
        {"past_values": torch.randn(2, 32, 1)},
    )
    yield "SuperPoint", lambda: t.SuperPointForKeypointDetection(t.SuperPointConfig()), small
    yield (
        "DPT",
        lambda: t.DPTForDepthEstimation(
            t.DPTConfig(use_batch_norm_in_fusion_residual=True, num_hidden_layers=12)
        ),
        {"pixel_values": _images(384)},
    )
    yield "ZoeDepth", lambda: t.TextNetForImageClassification(t.TextNetConfig()), small
    yield "HGNetV2", lambda: t.HGNetV2ForImageClassification(t.HGNetV2Config()), pixels
    yield (
        "EdgeTam",
        lambda: t.DFineForObjectDetection(t.DFineConfig()),
        {"pixel_values": _images(640, batch=1)},
    )
    yield (
        "VitMatte",
        lambda: t.VitMatteForImageMatting(
            t.VitMatteConfig(backbone_config=t.VitDetConfig(out_features=["stage12"]))
        ),
        {"pixel_values": _images(64, 4)},
    )


def others_cases() -> Iterator[Case]:
    try:
        import efficientnet_pytorch as e

        for name in ("efficientnet-b0", "efficientnet-b3"):
            yield name, lambda name=name: e.EfficientNet.from_name(name), _images(64)
    except ImportError:
        pass
    try:
        import resnest.torch as r

        for name in ("resnest50", "resnest101"):
            yield name, lambda name=name: getattr(r, name)(pretrained=False), _images(64)
    except ImportError:
        pass
    try:
        import pretrainedmodels as p

        for name in sorted(p.model_names):
            yield f"pm-{name}", lambda name=name: p.__dict__[name](pretrained=None), "timm"
    except ImportError:
        pass
    try:
        from torchreid import models as m
        from torchreid.reid.models import __model_factory as factory
    except ImportError:
        try:
            import torchreid.models as m

            factory = getattr(m, "__model_factory")
        except ImportError:
            factory = {}
    for name in sorted(factory):
        yield (
            f"reid-{name}",
            lambda name=name: factory[name](num_classes=10, pretrained=False, loss="softmax", use_gpu=False),
            torch.randn(2, 3, 256, 128),
        )


def speechbrain_cases() -> Iterator[Case]:
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from speechbrain.lobes.models.ResNet import ResNet
    from speechbrain.lobes.models.Xvector import Xvector

    yield (
        "ECAPA",
        lambda: ECAPA_TDNN(80, lin_neurons=32, channels=[64, 64, 64, 64, 192]),
        torch.randn(2, 50, 80),
    )
    yield "Xvector", lambda: Xvector(in_channels=40), torch.randn(2, 60, 40)
    yield "CRDNN", lambda: CRDNN(input_size=40), torch.randn(2, 50, 40)
    yield "ResNet", lambda: ResNet(input_size=80), torch.randn(2, 50, 80)


ZOOS: dict[str, Callable[[], Iterator[Case]]] = {
    "timm": timm_cases,
    "torchvision": torchvision_cases,
    "pytorchcv": pytorchcv_cases,
    "smp": smp_cases,
    "monai": monai_cases,
    "transformers": transformers_cases,
    "speechbrain": speechbrain_cases,
    "others": others_cases,
}


def is_norm(module: nn.Module) -> bool:
    return hasattr(module, "running_var") and getattr(module, "running_var", None) is not None


def inputs_for(model: nn.Module, kind: Any, name: str) -> Any:
    if not isinstance(kind, str):
        return kind
    if kind == "torchvision" and any(p in name for p in ("rcnn", "retinanet", "fcos", "ssd")):
        return ([torch.rand(3, 96, 128), torch.rand(3, 128, 96)],)
    if kind == "torchvision" and any(p in name for p in ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")):
        return torch.randn(1, 3, 16, 64, 64)
    if kind == "torchvision" and "raft" in name:
        return (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    config = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if config:
        size = config.get("input_size", (3, 224, 224))
        if not config.get("fixed_input_size") and kind == "timm" and size[-1] > 160:
            return [torch.randn(2, size[0], 96, 96), torch.randn(2, *size)]
        return [torch.randn(2, *size)]
    channels = getattr(model, "in_channels", 3) if isinstance(getattr(model, "in_channels", 3), int) else 3
    size = getattr(model, "in_size", (224, 224))
    size = size if isinstance(size, tuple) else (224, 224)
    return [torch.randn(2, channels, 96, 96), torch.randn(2, channels, *size[-2:])]


def calibrate(model: nn.Module, inputs: Any) -> Any:
    """Anchor the statistics to a batch, jitter them, and give about 30 % of the gammas a negative sign.

    Returns the first of several candidate inputs that the model takes.
    """
    norms = [module for module in model.modules() if is_norm(module)]
    moments = [getattr(module, "momentum", None) for module in norms]
    model.eval()
    for module in norms:
        module.training = True
        module.momentum = 1.0
    candidates = inputs if isinstance(inputs, list) else [inputs]
    try:
        for place, candidate in enumerate(candidates):
            try:
                with torch.no_grad():
                    run(model, candidate)
                    from bnfold.torch.sandbox import arrange

                    args, kwargs = arrange(candidate)
                    model(*args, **kwargs)
                chosen = candidate
                break
            except Exception:
                if place == len(candidates) - 1:
                    chosen = candidate
    finally:
        for module, momentum in zip(norms, moments, strict=True):
            module.momentum = momentum
        model.eval()
    for module in norms:
        mean, var = module.running_mean, module.running_var
        var.copy_(torch.where(torch.isfinite(var) & (var > 1e-6), var, torch.ones_like(var)))
        mean.copy_(torch.nan_to_num(mean))
        spread = var.sqrt()
        mean.add_(0.3 * spread * torch.randn_like(mean))
        var.mul_(torch.empty_like(var).uniform_(0.6, 1.6))
        if getattr(module, "weight", None) is not None:
            sign = torch.where(torch.rand_like(mean) < 0.3, -1.0, 1.0)
            module.weight.data.copy_(torch.empty_like(mean).uniform_(0.5, 1.5) * sign)
            module.bias.data.copy_(0.3 * torch.randn_like(mean))
    return chosen


def is_worth_it(build: Callable[[], nn.Module], limit: float) -> bool:
    """Whether a model has a BatchNorm and is not too large, as far as can be told without its numbers."""
    try:
        with torch.device("meta"):
            model = build()
    except Exception:
        return True
    few = sum(p.numel() for p in model.parameters()) <= limit
    return few and any(is_norm(module) for module in model.modules())


def examine(name: str, build: Callable[[], nn.Module], kind: Any, limit: float) -> dict[str, Any] | None:
    torch.manual_seed(0)
    if not is_worth_it(build, limit):
        return None
    model = build()
    if sum(p.numel() for p in model.parameters()) > limit or not any(
        is_norm(module) for module in model.modules()
    ):
        return None
    inputs = calibrate(model, inputs_for(model, kind, name))
    total = sum(is_norm(module) for module in model.modules())
    start = time.perf_counter()
    folded, report = fold(model, inputs, verify=False)
    seconds = time.perf_counter() - start
    left = sum(is_norm(module) for module in folded.modules())
    result: dict[str, Any] = {
        "norms": total,
        "left": left,
        "folded": report.count("folded"),
        "seconds": round(seconds, 2),
    }
    result["half"] = report.count("scale folded")
    result["reasons"] = {v.name: v.reason for v in report.verdicts if v.outcome != "folded"}
    result |= compare(model, inputs)
    return result


def compare(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The largest difference in float64, between a fold of a float64 copy and that copy, relative to the output."""
    import numpy as np

    wide = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs
    )
    with double():
        twin = to_float64(model)
        folded, _ = fold(twin, wide, verify=False)
        worst, moved = 0.0, 0.0
        base = None
        for seed in range(2):
            torch.manual_seed(seed)
            other = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: torch.randn_like(t) if t.is_floating_point() else t, wide
            )
            before, after = run(twin, other), run(folded, other)
            if set(before) != set(after):
                return {"deviation": float("inf")}
            for key in before:
                a, b = before[key], after[key]
                if a.dtype.kind not in "fc" or a.shape != b.shape:
                    continue
                peak = np.nanmax(np.abs(a), initial=0.0) or 1.0
                worst = max(
                    worst, float(np.nan_to_num(np.nanmax(np.abs(a - b), initial=0.0) / peak, nan=9.0))
                )
                if not (np.isfinite(a) == np.isfinite(b)).all():
                    worst = float("inf")
                if base is not None and key in base and base[key].shape == a.shape:
                    moved = max(moved, float(np.nanmax(np.abs(a - base[key]), initial=0.0) / peak))
            base = before
        noise = sensitivity(twin, other) if worst > 1e-12 else 0.0
    return {"deviation": worst, "moved": moved, "noise": noise}


def sensitivity(model: nn.Module, inputs: Any) -> float:
    """How far the output moves when the input moves by a unit roundoff: what no fold can do better than."""
    import numpy as np

    largest = 0.0
    for seed in range(2):
        torch.manual_seed(seed)
        other = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: torch.randn_like(t) if t.is_floating_point() else t, inputs
        )
        moved = torch.utils._pytree.tree_map_only(
            torch.Tensor,
            lambda t: t * (1 + 2.0**-52 * torch.randint(-1, 2, t.shape)) if t.is_floating_point() else t,
            other,
        )
        before, after = run(model, other), run(model, moved)
        for key, a in before.items():
            if a.dtype.kind == "f" and a.size and a.shape == after[key].shape:
                peak = float(np.nanmax(np.abs(a))) or 1.0
                largest = max(largest, float(np.nanmax(np.abs(a - after[key]))) / peak)
    return largest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.zoo_torch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoos", nargs="*", default=list(ZOOS))
    parser.add_argument("--only", default="")
    parser.add_argument("--first", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--out", default="")
    parser.add_argument("--limit", type=float, default=6e7, help="the largest number of parameters to try")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for zoo in options.zoos:
        try:
            cases = list(ZOOS[zoo]())
        except Exception as error:
            print(f"{zoo}: not installed ({error})", file=sys.stderr)
            continue
        for name, build, kind in [c for c in cases if options.only in c[0]][options.start :: options.every][
            : options.first
        ]:
            label = f"{zoo}/{name}"
            try:
                result = examine(name, build, kind, options.limit)
            except Exception as error:
                result = {
                    "error": f"{type(error).__name__}: {str(error)[:300]}",
                    "trace": traceback.format_exc()[-1500:],
                }
            if result is None:
                continue
            shown = {k: v for k, v in result.items() if k not in ("reasons", "trace")}
            print(f"{label:50s} {shown}", flush=True)
            if options.out:
                with Path(options.out).open("a") as out:
                    out.write(json.dumps({"name": label, **result}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
