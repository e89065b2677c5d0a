"""Networks as people have them: the model classes of transformers and monai, made small by their configurations.

`python -m tests.deploy.architectures` folds each of them, lets other tools fold it too, and writes the table of
docs/fold.md. Weights are random; statistics come from batches in training mode and are then moved, so that no norm is
near the identity and the input reaches the output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from steadynorm.training.evaluation import call
from tests.deploy.networks import Choosing


class Architecture(NamedTuple):
    """A model, and the shape of what it takes: of an image, of rows of numbers, by the name of its argument."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)
    argument: str = ""

    def batches(self) -> list[Any]:
        """Two batches of four samples."""
        numbers = [torch.randn(4, *self.shape) * (1 + 2 * i) for i in range(2)]
        return [{self.argument: x} for x in numbers] if self.argument else numbers


def hf(place, name, **options):
    """A model class of transformers, with a configuration."""

    def make():
        module = importlib.import_module(f"transformers.models.{place}.modeling_{place}")
        model = getattr(module, name)
        return model(model.config_class(**options))

    return make


def monai(name, *args, **options):
    """A network of monai."""
    return lambda: getattr(importlib.import_module("monai.networks.nets"), name)(*args, **options)


SPEECH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WAVES = SPEECH | {
    **{"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}
DETECTION = {
    **{"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "encoder_ffn_dim": 32, "num_denoising": 0},
    **{"encoder_attention_heads": 2, "d_model": 32, "num_queries": 10, "decoder_ffn_dim": 32},
    **{"decoder_attention_heads": 2, "decoder_in_channels": [32, 32, 32]},
}
HGNET = {
    **{"embedding_size": 16, "stem_channels": [3, 8, 16], "depths": [1] * 4, "hidden_sizes": [16, 16, 24, 32]},
    **{"stage_in_channels": [16, 16, 16, 24], "stage_mid_channels": [8] * 4, "stage_out_channels": [16, 16, 24, 32]},
    **{"stage_num_blocks": [1] * 4, "stage_downsample": [False, True, True, True], "stage_numb_of_layers": [2] * 4},
    **{"stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 5, 5]},
}
HIGHRES = (
    {"name": "conv_0", "n_features": 4, "kernel_size": 3},
    {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 2},
    {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
    {"name": "conv_1", "n_features": 8, "kernel_size": 1},
    {"name": "conv_2", "kernel_size": 1},
)


def rt_detr():
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
    backbone = RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    options = DETECTION | {"decoder_layers": 1, "decoder_n_points": 2}
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **options))


def d_fine():
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    options = HGNET | {"use_learnable_affine_block": True, "out_features": ["stage2", "stage3", "stage4"]}
    backbone = HGNetV2Config(**options)
    options = DETECTION | {"decoder_layers": 2, "decoder_n_points": [2, 2, 2]}
    return DFineForObjectDetection(DFineConfig(backbone_config=backbone, **options))


def detr():
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _DETR.items()}
    options = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "d_model": 32}
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, num_queries=8, **options, **sizes))


_DETR = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}


def postnet():
    from transformers import SpeechT5Config
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5SpeechDecoderPostnet

    sizes = {"num_mel_bins": 8, "speech_decoder_postnet_units": 16, "reduction_factor": 1, "hidden_size": 16}
    return SpeechT5SpeechDecoderPostnet(SpeechT5Config(**sizes))


STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
SMALL = (3, 32, 32)
GRAY = (1, 32, 32)

ARCHITECTURES: dict[str, Architecture] = {
    "ResNet, basic": Architecture(hf("resnet", "ResNetForImageClassification", **RESNET, layer_type="basic"), SMALL),
    "ResNet, bottleneck": Architecture(hf("resnet", "ResNetForImageClassification", **RESNET), SMALL),
    "RegNet": Architecture(
        hf(
            "regnet",
            "RegNetForImageClassification",
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 16],
            depths=[1] * 4,
            groups_width=4,
        ),
        SMALL,
    ),
    "MobileNetV1": Architecture(
        hf("mobilenet_v1", "MobileNetV1ForImageClassification", depth_multiplier=0.25, image_size=32), SMALL
    ),
    "MobileNetV2": Architecture(
        hf("mobilenet_v2", "MobileNetV2ForImageClassification", depth_multiplier=0.25, image_size=32), SMALL
    ),
    "EfficientNet": Architecture(
        hf(
            "efficientnet",
            "EfficientNetForImageClassification",
            image_size=32,
            width_coefficient=0.25,
            depth_coefficient=0.3,
            hidden_dim=320,
        ),
        SMALL,
    ),
    "ConvNeXt": Architecture(hf("convnext", "ConvNextForImageClassification", **STAGES), SMALL),
    "ConvNeXtV2": Architecture(hf("convnextv2", "ConvNextV2ForImageClassification", **STAGES), SMALL),
    "SegFormer": Architecture(
        hf(
            "segformer",
            "SegformerForSemanticSegmentation",
            hidden_sizes=[8, 8, 16, 16],
            depths=[1] * 4,
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        )
    ),
    "LeViT": Architecture(
        hf(
            "levit",
            "LevitForImageClassification",
            image_size=64,
            hidden_sizes=[16, 32, 48],
            num_attention_heads=[1, 2, 3],
            depths=[1] * 3,
            key_dim=[8] * 3,
        )
    ),
    "MobileViT": Architecture(
        hf(
            "mobilevit",
            "MobileViTForImageClassification",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            num_attention_heads=2,
        )
    ),
    "MobileViTV2": Architecture(
        hf("mobilevitv2", "MobileViTV2ForImageClassification", image_size=64, width_multiplier=0.25)
    ),
    "CvT": Architecture(
        hf("cvt", "CvtForImageClassification", embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3])
    ),
    "SwiftFormer": Architecture(
        hf(
            "swiftformer",
            "SwiftFormerForImageClassification",
            image_size=64,
            depths=[1] * 4,
            embed_dims=[8, 16, 16, 32],
        )
    ),
    "HGNetV2": Architecture(hf("hgnet_v2", "HGNetV2ForImageClassification", **HGNET)),
    "PP-LCNet": Architecture(hf("pp_lcnet", "PPLCNetForImageClassification", scale=0.25)),
    "TextNet": Architecture(
        hf(
            "textnet",
            "TextNetForImageClassification",
            stem_out_channels=8,
            hidden_sizes=[8, 8, 16, 16, 16],
            conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 1]], [[3, 3]]],
            conv_layer_strides=[[1], [2, 1], [2], [1]],
            image_size=[64, 64],
        )
    ),
    "DETR, frozen norms": Architecture(detr),
    "RT-DETR, frozen norms": Architecture(rt_detr),
    "D-FINE, frozen norms": Architecture(d_fine),
    "Wav2Vec2-Conformer": Architecture(hf("wav2vec2_conformer", "Wav2Vec2ConformerModel", **WAVES), (800,)),
    "Parakeet (Fast Conformer)": Architecture(
        hf("parakeet", "ParakeetEncoder", **SPEECH, subsampling_conv_channels=8, num_mel_bins=16),
        (64, 16),
        "input_features",
    ),
    "SeamlessM4T, speech": Architecture(
        hf(
            "seamless_m4t",
            "SeamlessM4TSpeechEncoder",
            hidden_size=32,
            speech_encoder_layers=2,
            speech_encoder_attention_heads=2,
            speech_encoder_intermediate_size=48,
            feature_projection_input_dim=16,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        (20, 16),
        "input_features",
    ),
    "HuBERT, norm before conv": Architecture(hf("hubert", "HubertModel", **WAVES, conv_pos_batch_norm=True), (800,)),
    "SpeechT5 postnet": Architecture(postnet, (12, 16)),
    "PatchTST": Architecture(
        hf(
            "patchtst",
            "PatchTSTForPrediction",
            num_input_channels=2,
            context_length=32,
            patch_length=8,
            patch_stride=8,
            d_model=16,
            ffn_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            norm_type="batchnorm",
            prediction_length=4,
        ),
        (32, 2),
        "past_values",
    ),
    "U-Net, residual units": Architecture(
        monai("UNet", 2, 1, 2, (4, 8, 16), (2, 2), num_res_units=2, norm="batch"), GRAY
    ),
    "U-Net, 3d": Architecture(monai("UNet", 3, 1, 2, (4, 8), (2,), norm="batch"), (1, 16, 16, 16)),
    "BasicUNet": Architecture(monai("BasicUNet", 2, 1, 2, (4, 4, 8, 8, 8, 4), norm="batch"), GRAY),
    "AttentionUnet": Architecture(monai("AttentionUnet", 2, 1, 2, (4, 8, 16), (2, 2)), GRAY),
    "DynUNet": Architecture(
        monai("DynUNet", 2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8], norm_name="batch"), GRAY
    ),
    "FlexibleUNet": Architecture(
        monai("FlexibleUNet", 3, 2, "resnet18", pretrained=False, spatial_dims=2, decoder_channels=(8, 8, 4, 4, 4))
    ),
    "SegResNet, pre-activation": Architecture(monai("SegResNet", 2, 8, norm="batch"), GRAY),
    "DenseNet, pre-activation": Architecture(
        monai("DenseNet", 2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)), GRAY
    ),
    "HighResNet, pre-activation": Architecture(
        monai("HighResNet", 2, 1, 2, norm_type="batch", layer_params=HIGHRES), (1, 16, 16)
    ),
    "SE-ResNet": Architecture(monai("SEResNet50", layers=(1,) * 4, spatial_dims=2, in_channels=1, num_classes=3), GRAY),
    "EfficientNet of monai": Architecture(
        monai("EfficientNetBN", "efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1, num_classes=3), GRAY
    ),
    "VNet": Architecture(monai("VNet", 2, 1, 2), GRAY),
    "RegUNet": Architecture(monai("RegUNet", 2, 1, 4, 2), GRAY),
    "VarAutoEncoder": Architecture(
        monai("VarAutoEncoder", 2, (1, 16, 16), 1, 3, (4, 8), (1, 2), norm="batch"), (1, 16, 16)
    ),
    "control flow by the data": Architecture(Choosing, (3, 8, 8)),
}


def made(name: str) -> tuple[nn.Module, list[Any]]:
    """An architecture in evaluation and two batches for it, always the same."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = architecture.make(), architecture.batches()
        if name == "control flow by the data":  # one batch for each of its paths
            batches = [batches[0] + 5, batches[1] - 5]
        _settle(model, batches)
    return model, batches


def _settle(model: nn.Module, batches: list[Any]) -> None:
    """Weights that keep what they are given at its size; statistics of the data, then moved; norms anew."""
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), torch.Tensor)]
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not hasattr(module, "parametrizations"):
                module.weight.normal_(0, (1.5 / module.weight[0].numel()) ** 0.5)
        for norm in norms:
            norm.momentum = 0.5
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5)):
                if tensor is not None:
                    tensor.uniform_(low, high)
            if norm.weight is not None:
                norm.weight[::5].neg_()
        for batch in batches * 4:
            call(model, batch)
        for norm in norms:
            deviation = norm.running_var.sqrt()
            norm.running_mean.add_(0.2 * deviation * torch.randn_like(deviation))
            norm.running_var.mul_(torch.empty_like(deviation).uniform_(0.7, 1.5))
    model.eval()
