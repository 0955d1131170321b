"""Traces networks that nobody here wrote: families of pytorchcv, and of transformers with tiny random configurations.

    python experiments/symmetry_of_libraries.py [--only EXPRESSION] [--results FILE]

Both libraries install beside a CPU torch (``pip install --no-deps pytorchcv``, ``pip install transformers``); networks
of a library that is absent are left out. No weights are fetched. Each network is traced in a process of its own, with
limits of time and memory. A line of ``results/symmetry_of_libraries.jsonl`` says of a network how many groups and units
move, what its permutations do to outputs of random weights that the trace did not see, and how many axes stay for which
reasons; ``--table`` prints these lines as a table. A line marked ``earlier`` was measured before channels moved inside
few wide groups, before what stays by nature was listed, and with gigabytes of all networks before it.
"""

import argparse
import importlib
import importlib.util
import json
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import fastws

RESULTS = Path(__file__).parent / "results/symmetry_of_libraries.jsonl"

# model of pytorchcv: size of its images where 224 pixels do not do
IMAGES = {
    "alexnet.alexnet": 224,
    "airnet.airnet50_1x64d_r2": 224,
    "bagnet.bagnet9": 224,
    "bninception.bninception": 224,
    "cbamresnet.cbam_resnet18": 224,
    "cgnet.cgnet_cityscapes": 128,
    "channelnet.channelnet": 224,
    "condensenet.condensenet74_c4_g4": 224,
    "darknet.darknet_tiny": 224,
    "darts.darts": 224,
    "densenet.densenet121": 224,
    "diapreresnet.diapreresnet10": 224,
    "diaresnet.diaresnet10": 224,
    "dicenet.dicenet_wd5": 224,
    "diracnetv2.diracnet18v2": 224,
    "dla.dla34": 224,
    "dpn.dpn68": 224,
    "efficientnet.efficientnet_b0": 224,
    "efficientnetedge.efficientnet_edge_small_b": 224,
    "fbnet.fbnet_cb": 224,
    "fdmobilenet.fdmobilenet_wd4": 224,
    "fishnet.fishnet99": 224,
    "fractalnet_cifar.fractalnet_cifar10": 32,
    "ghostnet.ghostnet": 224,
    "hardnet.hardnet39ds": 224,
    "hrnet.hrnet_w18_small_v1": 224,
    "ibnresnet.ibn_resnet50": 224,
    "igcv3.igcv3_wd4": 224,
    "inceptionv3.inceptionv3": 299,
    "irevnet.irevnet301": 224,
    "isqrtcovresnet.isqrtcovresnet18": 224,
    "menet.menet108_8x1_g3": 224,
    "mixnet.mixnet_s": 224,
    "mnasnet.mnasnet_small": 224,
    "mobilenet.mobilenet_wd4": 224,
    "mobilenetv2.mobilenetv2_wd4": 224,
    "mobilenetv3.mobilenetv3_small_w7d20": 224,
    "nin_cifar.nin_cifar10": 32,
    "octresnet.octresnet10_ad2": 224,
    "peleenet.peleenet": 224,
    "preresnet.preresnet10": 224,
    "proxylessnas.proxylessnas_cpu": 224,
    "pyramidnet_cifar.pyramidnet110_a48_cifar10": 32,
    "regnet.regnetx002": 224,
    "resattnet.resattnet56": 224,
    "resnesta.resnesta18": 224,
    "resnet.resnet10": 224,
    "resnext.resnext14_16x4d": 224,
    "revnet.revnet38": 224,
    "rir_cifar.rir_cifar10": 32,
    "selecsls.selecsls42": 224,
    "senet.senet16": 224,
    "seresnet.seresnet10": 224,
    "shufflenet.shufflenet_g3_wd4": 224,
    "shufflenetv2.shufflenetv2_wd2": 224,
    "sknet.sknet50": 224,
    "squeezenet.squeezenet_v1_1": 224,
    "squeezenext.sqnxt23_w1": 224,
    "vgg.vgg11": 224,
    "vovnet.vovnet27s": 224,
    "wrn_cifar.wrn16_10_cifar10": 32,
    "xception.xception": 299,
}

TEXT = dict(
    vocab_size=32,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=32,
)
GROUPED = dict(num_key_value_heads=2)
PICTURE = dict(image_size=32, patch_size=8, num_channels=3)
VISION = {
    key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
} | PICTURE
OLD = dict(vocab_size=32, n_embd=24, n_layer=2, n_head=4, n_positions=32)
TWO = dict(
    vocab_size=32, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=32,
)  # fmt: skip
T5 = dict(vocab_size=32, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2)

# class of transformers: arguments of its configuration
MODELS = {
    "AlbertModel": TEXT | dict(embedding_size=12),
    "BartModel": TWO,
    "BertModel": TEXT,
    "BloomForCausalLM": OLD | dict(hidden_size=24),
    "CanineModel": TEXT,
    "CLIPVisionModel": VISION,
    "ConvBertModel": TEXT | dict(embedding_size=24),
    "ConvNextModel": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32),
    "DebertaV2Model": TEXT | dict(relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "DeiTModel": VISION,
    "DistilBertModel": dict(vocab_size=32, dim=24, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=32),
    "ElectraModel": TEXT | dict(embedding_size=12),
    "ErnieModel": TEXT,
    "FalconForCausalLM": TEXT,
    "FNetModel": TEXT,
    "FunnelModel": dict(vocab_size=32, block_sizes=[1, 1], d_model=24, n_head=4, d_head=6, d_inner=40),
    "GemmaForCausalLM": TEXT | GROUPED | dict(head_dim=6),
    "GPT2LMHeadModel": OLD,
    "GPTNeoXForCausalLM": TEXT,
    "GPTJForCausalLM": OLD | dict(rotary_dim=4),
    "LlamaForCausalLM": TEXT | GROUPED,
    "LongformerModel": TEXT | dict(attention_window=4),
    "MambaForCausalLM": dict(vocab_size=32, hidden_size=24, num_hidden_layers=12, state_size=4),
    "MistralForCausalLM": TEXT | GROUPED,
    "MixtralForCausalLM": TEXT | GROUPED | EXPERTS,
    "MobileBertModel": TEXT | dict(embedding_size=12, true_hidden_size=12, intra_bottleneck_size=12),
    "MPNetModel": TEXT,
    "OPTForCausalLM": dict(
        vocab_size=32,
        hidden_size=24,
        word_embed_proj_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=40,
        max_position_embeddings=32,
    ),
    "PhiForCausalLM": TEXT | dict(hidden_size=32),
    "Qwen2ForCausalLM": TEXT | GROUPED,
    "Qwen3MoeForCausalLM": TEXT | GROUPED | EXPERTS | dict(moe_intermediate_size=20, head_dim=6),
    "RobertaModel": TEXT | dict(max_position_embeddings=40),
    "RwkvForCausalLM": dict(
        vocab_size=32, hidden_size=24, attention_hidden_size=24, num_hidden_layers=2, intermediate_size=40
    ),
    "SegformerModel": dict(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
    "SwinModel": dict(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 2], num_heads=[2, 2, 4], window_size=4),
    "T5Model": T5,
    "ViTModel": VISION,
    "Wav2Vec2Model": dict(
        vocab_size=32,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "XLNetModel": dict(vocab_size=32, d_model=24, n_layer=2, n_head=4, d_inner=40),
}


def networks():
    """Name, and function that builds a module and its example input, of every network whose library is there."""
    if importlib.util.find_spec("pytorchcv"):
        for name, size in IMAGES.items():
            yield f"pytorchcv {name}", lambda name=name, size=size: image_network(name, size)
    if importlib.util.find_spec("transformers"):
        for name, options in MODELS.items():
            yield f"transformers {name}", lambda name=name, options=options: transformer(name, options)


def image_network(name, size):
    family, build = name.split(".")
    module = getattr(importlib.import_module(f"pytorchcv.models.{family}"), build)()
    return module, torch.randn(1, 3, size, size)


def transformer(name, options):
    library = importlib.import_module("transformers")
    build = getattr(library, name)
    module = build(build.config_class(**options))
    size = getattr(module.config, "image_size", None) or 64
    size = size if isinstance(size, int) else size[0]
    tokens = torch.arange(8)[None] + 3
    inputs = {
        "pixel_values": {"pixel_values": torch.randn(1, 3, size, size)},
        "input_values": {"input_values": torch.randn(1, 800)},
    }.get(module.main_input_name, {"input_ids": tokens})
    if module.config.is_encoder_decoder and module.main_input_name == "input_ids":
        inputs["decoder_input_ids"] = tokens + 1
    return module, inputs


def measure(name, build):
    torch.manual_seed(0)
    module, inputs = build()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = {"network": name, "parameters": sum(p.numel() for p in module.parameters())}
    begin = time.perf_counter()
    try:
        symmetry = fastws.Symmetry.trace(module, inputs)
    except ValueError as error:
        return line | {"refused": str(error)}
    line |= {
        "groups": len(symmetry.sizes),
        "units": sum(symmetry.sizes),
        "seconds": round(time.perf_counter() - begin, 1),
        "gigabytes": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, 1),
        "tensors": len(symmetry.axes),
        "still": sum(not any(axes) for axes in symmetry.axes.values()),
        "error": symmetry.verify(module, inputs, 1, seed=11),
    }
    for key in ("unpermuted", "fixed"):
        reasons = Counter(sentence.partition(" stays: ")[2] for sentence in getattr(symmetry, key))
        line[key] = dict(reasons.most_common())
    return line


def in_own_process(name, seconds, gigabytes):
    """The line of a network, or one that says why there is none."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)

    command = [sys.executable, __file__, "--measure", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit)
    except subprocess.TimeoutExpired:
        return {"network": name, "refused": f"no answer in {seconds} seconds"}
    if done.returncode:
        return {"network": name, "refused": (done.stderr.strip().splitlines() or ["ended without a word"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(lines):
    columns = "network | groups | units | tensors | that stay | error | seconds | GB | axes that stay, and why"
    print(f"| {columns} |\n| --- {'| --- ' * columns.count('|')}|")
    for line in lines:
        if "refused" in line:
            print(f"| {line['network']} | refused | | | | | | | {line['refused']} |")
            continue
        kinds = (line["unpermuted"], line["fixed"])
        reasons = ["; ".join(f"{count}: {reason}" for reason, count in kind.items()) for kind in kinds]
        numbers = [line[key] for key in ("groups", "units", "tensors", "still")]
        numbers += [f"{line['error']:.0e}", line["seconds"], line["gigabytes"]]
        told = ". By nature: ".join(reasons) if reasons[0] else f"By nature: {reasons[1]}"
        print(f"| {line['network']} | {' | '.join(map(str, numbers))} | {told} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="networks whose names match this expression")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the lines")
    parser.add_argument("--seconds", type=float, default=900, help="limit of time for a network")
    parser.add_argument("--gigabytes", type=float, default=16, help="limit of address space for a network")
    parser.add_argument("--measure", help="print the line of this network")
    parser.add_argument("--table", action="store_true", help="print the lines that are there as a table")
    args = parser.parse_args()
    if args.table:
        return table(map(json.loads, args.results.read_text().splitlines()))
    if args.measure:
        return print(json.dumps(measure(args.measure, dict(networks())[args.measure])))
    args.results.parent.mkdir(exist_ok=True)
    with args.results.open("a" if args.only else "w") as file:
        for name, _ in networks():
            if re.search(args.only, name):
                line = in_own_process(name, args.seconds, args.gigabytes)
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
