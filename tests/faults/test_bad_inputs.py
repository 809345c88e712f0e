"""What a user can get wrong, and what each command says of it: one line, exit code 2, and nothing changed on disk.

TABLE is the whole of it: a command line, as behind `python -m`, in a folder with the files of `make_files`, and what
its error must say. All run in one process, by the function that the command's module calls.
"""

import hashlib
import importlib
import json
import os
import pickle
import random
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from export.huggingface import export_huggingface
from export.onnx import export_onnx
from gpt.checkpoint import KIND, VERSION, Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import run_command
from gpt.config import GPTConfig
from gpt.corpus import CorpusConfig, build_corpus
from gpt.tokenizer import CharTokenizer
from tvm_frontend.compile import compile_model
from tvm_frontend.options import CompileOptions

pytestmark = pytest.mark.slow

LONG = "x" * 300  # a file's name must not have more than 255 bytes
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"
# Commands whose module does nothing but call another's `main`.
MAINS = {
    "bench": "bench.__main__",
    "bench.ladder": "bench.studies.ablation",
    "bench.search": "bench.studies.search",
    "bench.support": "bench.studies.support",
    "bench.training": "bench.studies.training",
    "gpt-frontend": "gpt.commands",
}
TABLE = """
# Files that are not what they should be: training and what begins with a text
gpt.train tiny --corpus not-here → not-here: cannot be read (No such file or directory)
gpt.train tiny --corpus empty → empty: is empty
gpt.train tiny --corpus folder → folder: no corpus (manifest.json is absent)
gpt.train tiny --corpus latin1.txt → latin1.txt: not UTF-8 text (byte 1)
gpt.train tiny --corpus random → random: not UTF-8 text (byte 0)
gpt.train tiny --corpus nanogpt/train.bin → nanogpt/train.bin: not text but bytes (it holds '\\x00', place 0)
gpt.train tiny --corpus nanogpt-odd → nanogpt-odd/val.bin: has 501 bytes, no whole number of tokens of 2
gpt.train tiny --corpus nanogpt-beyond → nanogpt-beyond/val.bin: has the token 61, and its meta.pkl has 28 of them
gpt.train tiny --corpus nanogpt --tokenizer gpt2 → nanogpt: was made with tokenizer 'characters', not 'gpt2'
gpt.train tiny --corpus code-in-meta → code-in-meta/meta.pkl: not nanoGPT's meta.pkl
gpt.train tiny --corpus nowhere → nowhere: cannot be read (No such file or directory)
gpt.train tiny --corpus loop → loop: cannot be read (Too many levels of symbolic links)
gpt.train tiny --corpus short.txt → short.txt: 1 tokens to train on and 1 to validate on are too few for block_size=32
gpt.train tiny --corpus corpus-json → corpus-json/manifest.json: cannot be read
gpt.train tiny --corpus corpus-list → corpus-list/manifest.json: not a corpus of this version of the project
gpt.train tiny --corpus corpus-keys → corpus-keys/manifest.json: is damaged
gpt.train tiny --corpus corpus-up → corpus-up/manifest.json: is damaged
gpt.train tiny --corpus corpus-cut → corpus-cut/train-00000.bin: is absent or not 1,584 tokens long
gpt.train tiny --corpus corpus-gone → corpus-gone/val-00000.bin: is absent or not 176 tokens long
gpt.train tiny --corpus corpus --tokenizer gpt2 → corpus: was made with tokenizer 'characters', not 'gpt2'
gpt.train tiny --corpus text.txt --init-from not-here → no such file or folder, and not one of gpt2, gpt2-medium
gpt.train tiny --corpus text.txt --init-from cut.pt → cut.pt: is truncated or damaged
gpt.train tiny --corpus text.txt --init-from ckpt.pt → block_size=32: ckpt.pt has 16
# Numbers out of range, choices that are none, flags that exclude each other
gpt.train nonsense → Unrecognized options: nonsense
gpt.train tiny --batch-size nan → invalid literal for int() with base 10: 'nan'
gpt.train tiny --batch-size 0 → batch_size=0: must be at least 1
gpt.train tiny --batch-size -1 → batch_size=-1: must be at least 1
gpt.train tiny --max-steps x → invalid literal for int() with base 10: 'x'
gpt.train tiny --max-steps -1 → max_steps=-1: must be at least 1
gpt.train tiny --n-layer 0 → n_layer=0: must be a whole number of at least 1
gpt.train tiny --n-head 0 → n_head=0: must be a whole number of at least 1
gpt.train tiny --n-head 3 → n_embd=32: must be a multiple of n_head=3
gpt.train tiny --n-embd -4 → n_embd=-4: must be a whole number of at least 1
gpt.train tiny --block-size 0 → block_size=0: must be a whole number of at least 1
gpt.train tiny --dropout 1.5 → dropout=1.5: must be in [0, 1)
gpt.train tiny --dropout nan → dropout=nan: must be in [0, 1)
gpt.train tiny --learning-rate nan → learning_rate=nan: must be at least 0
gpt.train tiny --learning-rate -1 → learning_rate=-1.0: must be at least 0
gpt.train tiny --learning-rate 1e400 → learning_rate=inf: must be at least 0
gpt.train tiny --min-lr 1 → min_lr=1.0: must be at most learning_rate=0.001
gpt.train tiny --beta2 1 → beta2=1.0: must be below 1
gpt.train tiny --weight-decay -1 → weight_decay=-1.0: must be at least 0
gpt.train tiny --grad-clip nan → grad_clip=nan: must be at least 0
gpt.train tiny --seed -1 → seed=-1: must be at least 0
gpt.train tiny --seed 1e400 → invalid literal for int() with base 10: '1e400'
gpt.train tiny --seed 99999999999999999999 → seed=99999999999999999999: must be at least 0
gpt.train tiny --minutes 0 → must be above 0
gpt.train tiny --minutes nan → minutes=nan: must be
gpt.train tiny --patience 0 → patience=0: must be at least 1
gpt.train tiny --eval-interval 0 → eval_interval=0: must be at least 1
gpt.train tiny --eval-batches 0 → eval_batches=0: must be at least 1
gpt.train tiny --keep-last 0 → keep_last=0: must be at least 1
gpt.train tiny --warmup-steps -1 → warmup_steps=-1: must be at least 0
gpt.train tiny --micro-batch-size 5 --corpus text.txt → must divide a rank's share of a batch, which is 12
gpt.train tiny --block-size 100000 --corpus text.txt → 1,584 tokens to train on and 176 to validate on are too few for
gpt.train tiny --activation swish → invalid choice 'swish' for argument '--activation'
gpt.train tiny --order backwards → invalid choice 'backwards' for argument '--order'
gpt.train tiny --precision fp8 → invalid choice 'fp8' for argument '--precision'
gpt.train tiny --model rnn → invalid choice 'rnn' for argument '--model'
gpt.train tiny --device tpu --corpus text.txt → --device tpu: must be auto, cuda, mps, cpu, or one of several GPUs as
gpt.train tiny --resume --overwrite → resume=True: must not come with overwrite=True
gpt.train tiny --nonsense 3 → Unrecognized options: --nonsense, 3
gpt.train tiny --corpus text.txt -o folder → cannot write folder: it is a directory
gpt.train tiny --corpus text.txt -o text.txt/ckpt.pt → cannot write text.txt/ckpt.pt: File exists
gpt.train tiny --corpus text.txt -o text.txt → text.txt is read from there
gpt.train tiny --corpus text.txt -o {long} → File name too long
gpt.train tiny --corpus text.txt -o '' → text.txt is read from there
# Text from a checkpoint, and what is in it
gpt.generate not-here.pt → not-here.pt: cannot be read (No such file or directory)
gpt.generate empty → empty: not a checkpoint
gpt.generate folder → folder: cannot be read (Is a directory)
gpt.generate hf-llama → hf-llama/config.json: model_type='llama' (rotary positions, RMSNorm, a gated MLP), not 'gpt2'
gpt.generate model.onnx → model.onnx: not a checkpoint but an ONNX file
gpt.generate text.txt → text.txt: not a checkpoint
gpt.generate random → random: not a checkpoint
gpt.generate zip → zip: not a checkpoint
gpt.generate tar → tar: not a checkpoint
gpt.generate pickle → pickle: not a checkpoint
gpt.generate cut.pt → cut.pt: is truncated or damaged
gpt.generate flipped.pt → flipped.pt: is truncated or damaged
gpt.generate nan.pt → nan.pt: transformer.h.0.mlp.c_fc.weight holds NaN or infinity: training diverged
gpt.generate version.pt → version.pt: has version 99 of the checkpoint format, this code reads 1
gpt.generate list.pt → list.pt: is damaged (its state is not a dict of tensors)
gpt.generate shape.pt → shape.pt: does not fit its own config: lm_head.weight is float32 [28, 32], not float32
gpt.generate unknown.pt → unknown.pt: is damaged (the config has fields that this code does not know: rope)
gpt.generate heads.pt → heads.pt: is damaged (n_embd=32: must be a multiple of n_head=5)
gpt.generate tokens.pt → tokens.pt: is damaged ({'kind': 'words'}: not a tokenizer of ours
gpt.generate letters.pt → letters.pt: does not fit: its tokenizer has 30 ids, but vocab_size=28
gpt.generate other.pt → other.pt: not a checkpoint: holds a dict of a, and no state dict of a model
gpt.generate bare.pt → not say its heads and activation; make a checkpoint of it with: python -m gpt.pretrained bare.pt
gpt.generate llama.pt → llama.pt: this is a Llama or its like: rotary positions, RMSNorm, a gated MLP; only GPT-2s
gpt.generate code.pt → code.pt: refused, because it holds more than tensors and plain values and could run code when
gpt.generate code-legacy.pt → refused, because it holds more than tensors and plain values and could run code when
gpt.generate code-in-meta/ckpt.pt → code-in-meta/meta.pkl: not nanoGPT's meta.pkl, a pickle of a dict with itos (it
gpt.generate cut.safetensors → cut.safetensors: not a readable safetensors file
gpt.generate cut.bin → cut.bin: is truncated or damaged (2,048 of
gpt.generate nowhere → nowhere: cannot be read (No such file or directory)
gpt.generate loop → loop: cannot be read (Too many levels of symbolic links)
gpt.generate {long} → File name too long
gpt.generate bigram.pt → this model has no tokenizer, so it knows no text
gpt.generate ckpt.pt --tokens -1 → tokens=-1: must be at least 0
gpt.generate ckpt.pt --tokens x → invalid literal for int() with base 10: 'x'
gpt.generate ckpt.pt --samples 0 → samples=0: must be at least 1
gpt.generate ckpt.pt --temperature -1 → temperature=-1.0: must be at least 0
gpt.generate ckpt.pt --temperature nan → temperature=nan: must be at least 0
gpt.generate ckpt.pt --temperature 1e400 → temperature=inf: must be at least 0
gpt.generate ckpt.pt --top-k 0 → top_k=0: must be at least 1
gpt.generate ckpt.pt --top-p 0 → top_p=0.0: must be above 0
gpt.generate ckpt.pt --top-p nan → top_p=nan: must be above 0
gpt.generate ckpt.pt --top-p 1.5 → top_p=1.5: must be above 0
gpt.generate ckpt.pt --seed -1 → seed=-1: must be at least 0
gpt.generate ckpt.pt --prompt '' → no token ids: a model needs at least one to start from
gpt.generate ckpt.pt --prompt ÄÖÜ → the character 'Ä' (place 0) is not among the 28 that the model was trained on
gpt.generate ckpt.pt --prompt a --prompt-file text.txt → --prompt and --prompt-file are two prompts
gpt.generate ckpt.pt --prompt-file not-here → --prompt-file not-here: cannot be read as UTF-8 text ([Errno 2] No such
gpt.generate ckpt.pt --prompt-file latin1.txt → --prompt-file latin1.txt: cannot be read as UTF-8 text
gpt.generate ckpt.pt --prompt-file folder → --prompt-file folder: cannot be read as UTF-8 text ([Errno 21] Is a
gpt.generate ckpt.pt --prompt-file loop → --prompt-file loop: cannot be read as UTF-8 text ([Errno 40] Too many
gpt.generate ckpt.pt --device gpu → --device gpu: must be auto, cuda, mps, cpu, or one of several GPUs as cuda:1
gpt.inspect not-here.pt → not-here.pt: cannot be read (No such file or directory)
gpt.inspect cut.pt → cut.pt: is truncated or damaged
gpt.inspect nan.pt → nan.pt: transformer.h.0.mlp.c_fc.weight holds NaN or infinity: training diverged
gpt.inspect model.onnx → model.onnx: not a checkpoint but an ONNX file
gpt.inspect tvm → tvm: not a checkpoint but a compiled model
gpt.inspect ckpt.pt --batch-size 0 → batch_size=0: must be at least 1
gpt.inspect ckpt.pt --batch-size 1e3 → invalid literal for int() with base 10: '1e3'
gpt.inspect ckpt.pt more → Unrecognized options: more
# Corpora
gpt.corpus → Missing from python -m gpt.corpus
gpt.corpus not-here → not-here: cannot be read (No such file or directory)
gpt.corpus folder -o new → folder: a folder without files
gpt.corpus empty -o new → empty: is empty
gpt.corpus latin1.txt -o new → latin1.txt: not UTF-8 text (byte 1)
gpt.corpus loop -o new → loop: cannot be read (No such file or directory)
gpt.corpus list.jsonl --tokenizer characters -o new → list.jsonl:1: has no text under 'text'
gpt.corpus cut.jsonl --tokenizer characters -o new → cut.jsonl:2: not a line of JSON
gpt.corpus number.jsonl --tokenizer characters -o new → number.jsonl:1: has no text under 'text'
gpt.corpus other.jsonl --tokenizer characters -o new → other.jsonl:1: has no text under 'text'
gpt.corpus text.parquet --tokenizer characters -o new → text.parquet: not a Parquet file
gpt.corpus hf: --tokenizer characters -o new → hf:: must be hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@REVISION
gpt.corpus text.txt --val-share 0 → val_share=0.0: must be above 0
gpt.corpus text.txt --val-share 0.9 → val_share=0.9: must be above 0
gpt.corpus text.txt --val-share nan → val_share=nan: must be above 0
gpt.corpus text.txt --shard-tokens 0 → shard_tokens=0: must be at least 1
gpt.corpus text.txt --max-tokens -1 → max_tokens=-1: must be at least 1
gpt.corpus text.txt --tokenizer words → invalid choice 'words' for argument '--tokenizer'
gpt.corpus text.txt --tokenizer characters -o hf → hf: holds something else than a corpus
gpt.corpus text.txt --tokenizer characters -o text.txt → text.txt: holds something else than a corpus
gpt.corpus text.txt --tokenizer characters -o corpus → corpus: holds a corpus of another source or settings
gpt.corpus text.txt --tokenizer characters -o corpus-json → corpus-json/manifest.json: cannot be read
gpt.corpus text.txt --tokenizer characters -o {long} → File name too long
# Hugging Face's folders
gpt.pretrained → Missing from python -m gpt.pretrained
gpt.pretrained not-here → not-here: no such file or folder, and not one of gpt2, gpt2-medium, gpt2-large, gpt2-xl
gpt.pretrained folder → folder: a folder without a config.json; give one of transformers, or the file of a model
gpt.pretrained ckpt.pt -o ckpt.pt → ckpt.pt is read from there
gpt.pretrained text.txt -o new.pt → text.txt: not a checkpoint; it is no file of torch.save, safetensors or llm.c
gpt.pretrained bare.pt --heads 3 -o new.pt → bare.pt: a GPT-2's weights, and the file does not say its activation
gpt.pretrained bare.pt --heads 3 --activation gelu -o new.pt → n_embd=32: must be a multiple of n_head=3
gpt.pretrained bare.pt --activation swiglu → invalid choice 'swiglu' for argument '--activation'
gpt.pretrained llama.pt -o new.pt → llama.pt: this is a Llama or its like
gpt.pretrained hf-json -o new.pt → hf-json/config.json: cannot be read as JSON
gpt.pretrained hf-list -o new.pt → hf-list/config.json: is not a JSON object
gpt.pretrained hf-deep -o new.pt → hf-deep/config.json: cannot be read as JSON
gpt.pretrained hf-latin1 -o new.pt → hf-latin1/config.json: cannot be read as JSON
gpt.pretrained hf-llama -o new.pt → model_type='llama' (rotary positions, RMSNorm, a gated MLP), not 'gpt2', the only
gpt.pretrained hf-kind -o new.pt → model_type=['gpt2'], not 'gpt2', the only kind that can be read
gpt.pretrained hf-activation -o new.pt → activation_function={'a': 1}: must be one of gelu_new
gpt.pretrained hf-heads -o new.pt → hf-heads/config.json: n_head='two': must be a whole number of at least 1
gpt.pretrained hf-embd -o new.pt → hf-embd/config.json: n_embd=33: must be a multiple of n_head=2
gpt.pretrained hf-layers -o new.pt → hf-layers: does not fit its config.json
gpt.pretrained hf-vocab -o new.pt → hf-vocab/config.json: vocab_size=-1: must be a whole number of at least 1
gpt.pretrained hf-inner -o new.pt → hf-inner/config.json: n_inner='wide': must be a whole number of at least 1
gpt.pretrained hf-epsilon -o new.pt → layer_norm_epsilon=None: must be a finite number of at least 0
gpt.pretrained hf-no-config -o new.pt → hf-no-config: a folder without a config.json
gpt.pretrained hf-no-weights -o new.pt → hf-no-weights: holds no model.safetensors
gpt.pretrained hf-weights -o new.pt → hf-weights/model.safetensors: not a readable safetensors file
gpt.pretrained hf-cut -o new.pt → hf-cut/model.safetensors: not a readable safetensors file
gpt.pretrained hf-tokenizer -o new.pt → hf-tokenizer/tokenizer.json: holds no vocabulary
gpt.pretrained hf-merges -o new.pt → hf-merges/tokenizer.json: holds no vocabulary
gpt.pretrained hf-up -o new.pt → '../hf/model.safetensors', no file of this folder
gpt.pretrained hf-absolute -o new.pt → '/etc/hostname', no file of this folder
gpt.pretrained hf-shards -o new.pt → ['model.safetensors'], no file of this folder
gpt.pretrained hf-shard-number -o new.pt → 3, no file of this folder
gpt.pretrained hf-shard-missing -o new.pt → hf-shard-missing/model-00001.safetensors: cannot be read (No such file or
gpt.pretrained hf-flipped -o new.pt → missing, damaged or edited: it does not match its hash
gpt.pretrained hf -o folder → cannot write folder: it is a directory
gpt.pretrained hf -o hf/config.json → hf/config.json is read from there
gpt.pretrained hf -o text.txt/new.pt → cannot write text.txt/new.pt: File exists
# Exports of a checkpoint
export.onnx not-here.pt → not-here.pt: cannot be read (No such file or directory)
export.onnx empty -o new.onnx → empty: not a checkpoint
export.onnx model.onnx -o new.onnx → model.onnx: not a checkpoint but an ONNX file
export.onnx hf-llama -o new.onnx → model_type='llama' (rotary positions, RMSNorm, a gated MLP), not
export.onnx bare.pt -o new.onnx → python -m gpt.pretrained bare.pt --heads N --activation gelu_tanh -o artifacts/ckpt.pt
export.onnx tvm -o new.onnx → tvm: not a checkpoint but a compiled model
export.onnx cut.pt -o new.onnx → cut.pt: is truncated or damaged
export.onnx flipped.pt -o new.onnx → flipped.pt: is truncated or damaged
export.onnx nan.pt -o new.onnx → nan.pt: transformer.h.0.mlp.c_fc.weight holds NaN or infinity: training diverged
export.onnx pickle -o new.onnx → pickle: not a checkpoint
export.onnx ckpt.pt -o ckpt.pt → ckpt.pt is read from there
export.onnx ckpt.pt -o folder → cannot write folder: it is a directory
export.onnx ckpt.pt -o text.txt/new.onnx → cannot write text.txt/new.onnx: File exists
export.onnx ckpt.pt -o {long} → File name too long
export.onnx ckpt.pt -o '' → ckpt.pt is read from there
export.onnx ckpt.pt --opset 3 -o new.onnx → opset 3: must be 18 to 25 with the dynamo exporter
export.onnx ckpt.pt --opset 99 -o new.onnx → opset 99: must be 18 to 25 with the dynamo exporter
export.onnx ckpt.pt --opset x → no type matching {None}|INT could be instantiated from ['x'].
export.onnx ckpt.pt --opset 20 --with-cache -o new.onnx → opset 20: a static cache needs 24 or later
export.onnx ckpt.pt --exporter nonsense → invalid choice 'nonsense' for argument '--exporter'
export.onnx ckpt.pt --precision fp8 → invalid choice 'fp8' for argument '--precision'
export.onnx ckpt.pt --with-cache --cache past → --with-cache and --cache past are two forms
export.onnx ckpt.pt --with-cache --exporter torchscript -o new.onnx → a static cache with the torchscript exporter
export.onnx ckpt.pt --with-cache --precision int8 → invalid choice 'int8' for argument '--precision'
export.onnx bigram.pt --with-cache -o new.onnx → a static cache of a bigram: it has no keys and values to keep
export.huggingface not-here.pt → not-here.pt: cannot be read (No such file or directory)
export.huggingface cut.pt -o new → cut.pt: is truncated or damaged
export.huggingface bigram.pt -o new → bigram.pt: is a bigram
export.huggingface ckpt.pt -o folder-of-text.txt/../text.txt → exists and is no GPT-2 folder of ours, so it is not
export.huggingface ckpt.pt -o tvm → tvm: exists and is no GPT-2 folder of ours, so it is not replaced
export.huggingface ckpt.pt -o text.txt/new → cannot write text.txt/new: File exists
export.huggingface ckpt.pt -o {long} → File name too long
export.ctranslate2 not-here.pt → not-here.pt: cannot be read (No such file or directory)
export.ctranslate2 nan.pt -o new → nan.pt: transformer.h.0.mlp.c_fc.weight holds NaN or infinity: training diverged
export.ctranslate2 ckpt.pt -o tvm → tvm: exists and is no such model of ours, so it is not replaced
export.ctranslate2 bigram.pt -o new → bigram.pt: is a bigram
# ONNX files
export.inspect not-here.onnx → not-here.onnx: no such file
export.inspect empty → empty: holds no graph
export.inspect folder → folder: a folder
export.inspect text.txt → text.txt: not a readable ONNX file
export.inspect random → random: not a readable ONNX file
export.inspect ckpt.pt → ckpt.pt: not an ONNX file but a checkpoint
export.inspect hf → hf: not an ONNX file but a folder of Hugging Face's
export.inspect tvm → tvm: not an ONNX file but a compiled model
export.inspect cut.onnx → cut.onnx: not a readable ONNX file
export.inspect flipped.onnx → flipped.onnx: does not match its own hash, so it was damaged or edited
export.inspect utf8.onnx → utf8.onnx: not a readable ONNX file (a name in it is no UTF-8 text)
export.inspect no-nodes.onnx → no-nodes.onnx: holds no graph
export.inspect loop → loop: no such file
export.inspect nowhere → nowhere: no such file
export.inspect {long} → File name too long
export.quantize not-here.onnx → not-here.onnx: no such file
export.quantize theirs.onnx -o new.onnx → not an export of this project (no gpt_frontend.format=2 in its metadata)
export.quantize flipped.onnx -o new.onnx → flipped.onnx: does not match its own hash, so it was damaged or edited
export.quantize ckpt.pt -o new.onnx → ckpt.pt: not an ONNX file but a checkpoint
export.quantize model.onnx -o model.onnx → model.onnx is read from there
export.quantize model.onnx -o folder → cannot write folder: it is a directory
export.quantize model.onnx -o text.txt/new.onnx → cannot write text.txt/new.onnx: File exists
export.quantize model.onnx --bits 4 → bits=4: ONNX Runtime's dynamic quantisation has 8 only
export.quantize model.onnx --bits 3 → invalid choice '3' for argument '--bits'
export.quantize model.onnx --tool nonsense → invalid choice 'nonsense' for argument '--tool'
export.quantize model.onnx --tool openvino -o hf → hf: exists and is no quantised model, so it is not replaced
export.quantize model.onnx --tool openvino -o text.txt → exists and is no quantised model, so it is not replaced
# Compiled models
tvm_frontend.compile not-here.onnx → not-here.onnx: no such file
tvm_frontend.compile empty -o new → empty: holds no graph
tvm_frontend.compile folder -o new → folder: a folder
tvm_frontend.compile ckpt.pt -o new → ckpt.pt: not an ONNX file but a checkpoint
tvm_frontend.compile nan.onnx -o new → nan.onnx: weight 'transformer.wpe.weight' holds NaN or infinity
tvm_frontend.compile dims.onnx -o new → dims.onnx: weight 'transformer.wpe.weight' does not fit its shape
tvm_frontend.compile up.onnx -o new → said to lie at '../data', which is not beside it: refused
tvm_frontend.compile absolute.onnx -o new → said to lie at '/etc/hostname', which is not beside it: refused
tvm_frontend.compile nameless.onnx -o new → said to lie at '', which is not beside it: refused
tvm_frontend.compile missing.onnx -o new → its weights in not-here.data cannot be read: No such file or directory
tvm_frontend.compile short.onnx -o new → (text.txt: ends before the 2,048 bytes of 'transformer.wpe.weight' at 0)
tvm_frontend.compile beyond.onnx -o new → ends before the 2,048 bytes of 'transformer.wpe.weight' at 10,000,000)
tvm_frontend.compile negative.onnx -o new → (where 'transformer.wpe.weight' lies is not said)
tvm_frontend.compile words.onnx -o new → (where 'transformer.wpe.weight' lies is not said)
tvm_frontend.compile length.onnx -o new → 'transformer.wpe.weight' has 2,048 bytes, not the 17 at 0 that are said
tvm_frontend.compile undefined.onnx -o new → ONNX's checker refuses it (Nodes in a graph must be topologically sorted
tvm_frontend.compile twice.onnx -o new → ONNX's checker refuses it (Graph must be in single static assignment (SSA)
tvm_frontend.compile operator.onnx -o new → operator Nonsense of domain ai.onnx (opset 23)
tvm_frontend.compile domain.onnx -o new → ONNX's checker refuses it (No opset import for domain 'com.example'
tvm_frontend.compile opset.onnx -o new → opset.onnx: opset 99, and ONNX has none above
tvm_frontend.compile no-opset.onnx -o new → no-opset.onnx: names no opset of ONNX itself
tvm_frontend.compile no-nodes.onnx -o new → no-nodes.onnx: holds no graph
tvm_frontend.compile no-input.onnx -o new → ONNX's checker refuses it (Nodes in a graph must be topologically sorted
tvm_frontend.compile no-output.onnx -o new → no-output.onnx: gives no output
tvm_frontend.compile utf8.onnx -o new → utf8.onnx: not a readable ONNX file (a name in it is no UTF-8 text)
tvm_frontend.compile flipped.onnx -o new → flipped.onnx: does not match its own hash, so it was damaged or edited
tvm_frontend.compile cut.onnx -o new → cut.onnx: not a readable ONNX file
tvm_frontend.compile text.txt -o new → text.txt: not a readable ONNX file
tvm_frontend.compile model.onnx -o text.txt → text.txt: exists and is no compiled model, so it is not replaced
tvm_frontend.compile model.onnx -o hf → hf: exists and is no compiled model, so it is not replaced
tvm_frontend.compile model.onnx -o folder-x/../model.onnx → exists and is no compiled model, so it is not replaced
tvm_frontend.compile model.onnx --target tpu → target 'tpu': not known
tvm_frontend.compile model.onnx --target llvm --arch sm_86 → arch 'sm_86' is a GPU's and target llvm is the CPU
tvm_frontend.compile model.onnx --target cuda --arch sm_1 → arch 'sm_1': not known
tvm_frontend.compile model.onnx --mcpu nonsense → mcpu 'nonsense': not known to LLVM
tvm_frontend.compile model.onnx --mcpu '' → mcpu '': not known to LLVM
tvm_frontend.compile model.onnx --opt-level 7 → invalid choice '7' for argument '--opt-level'
tvm_frontend.compile model.onnx --opt-level 2 → opt level 2: must be 0 (TVM's own untuned pipeline) or 3 (this
tvm_frontend.compile model.onnx --precision fp8 → invalid choice 'fp8' for argument '--precision'
tvm_frontend.compile model.onnx --precision fp16 → precision 'fp16': must be one of fp32, bf16, int8, int4 for target
tvm_frontend.compile model.onnx --opt-level 0 --precision int8 → precision 'int8': must be one of fp32 for target
tvm_frontend.compile model.onnx --frontend nonsense → invalid choice 'nonsense' for argument '--frontend'
tvm_frontend.compile model.onnx --frontend torch → --frontend torch reads a checkpoint, as artifacts/ckpt.pt
tvm_frontend.compile cut.pt --frontend torch → cut.pt: is truncated or damaged
tvm_frontend.compile model.onnx --batch 1 → --batch and --tokens: give both or neither
tvm_frontend.compile model.onnx --batch 1 --tokens 4 → --batch and --tokens: not with --frontend onnx, which serves
tvm_frontend.compile model.onnx --frontend relax-onnx --batch 0 --tokens 4 → --batch 0 --tokens 4: must be at least 1
tvm_frontend.compile model.onnx --without nonsense -o new → without 'nonsense': must be one of recover_gelu
tvm_frontend.compile model.onnx --fast-math → --fast-math is for --target cuda: leave it out
tvm_frontend.compile model.onnx --compiler icc → invalid choice 'icc' for argument '--compiler'
tvm_frontend.inspect not-here → not-here: no compiled model there (no model.json)
tvm_frontend.inspect folder → folder: no compiled model there (no model.json)
tvm_frontend.inspect tvm → tvm: compiled for llvm
tvm_frontend.inspect tvm-flipped → tvm-flipped/library.so: missing or damaged, it does not match its checksum
tvm_frontend.inspect tvm-json → tvm-json/model.json: damaged, or not of a compiled model
tvm_frontend.inspect tvm-list → tvm-list/model.json: damaged, or not of a compiled model
tvm_frontend.inspect tvm-edited → tvm-edited/model.json: damaged or edited, it does not match its own hash
tvm_frontend.inspect tvm-weights → tvm-weights/weights.bin: missing or damaged, it does not match its checksum
tvm_frontend.inspect model.onnx → model.onnx: not a compiled model but an ONNX file
tvm_frontend.inspect hf → hf: not a compiled model but a folder of Hugging Face's
tvm_frontend.tune model.onnx → Missing from python -m tvm_frontend.tune
tvm_frontend.tune model.onnx --tokens 0 → tokens=0: must be in 1 … 16, the model's block_size
tvm_frontend.tune model.onnx --tokens 99 → tokens=99: must be in 1 … 16, the model's block_size
tvm_frontend.tune model.onnx --tokens x → invalid literal for int() with base 10: 'x'
tvm_frontend.tune model.onnx --tokens 4 --batch 0 → batch=0: must be at least 1
tvm_frontend.tune model.onnx --tokens 4 --trials 0 → trials=0: must be at least 1
tvm_frontend.tune not-here.onnx --tokens 4 → not-here.onnx: no such file
tvm_frontend.tune ckpt.pt --tokens 4 → ckpt.pt: not an ONNX file but a checkpoint
tvm_frontend.tune model.onnx --tokens 4 --opt-level 1 → invalid choice '1' for argument '--opt-level'
tvm_frontend.tune model.onnx --tokens 4 -o hf → hf: exists and is no compiled model, so it is not replaced
# Comparisons
bench --artifacts . --engine nonsense → engine 'nonsense': not known
bench --artifacts . --engine eager --threads 0 → threads=0: must be
bench --artifacts . --engine eager --threads 100000 → threads=100000: must be
bench --artifacts . --engine eager --minutes 0 → minutes=0.0: must be more than 0
bench --artifacts . --engine eager --minutes nan → minutes=nan: must be more than 0
bench --artifacts . --engine eager --seed -1 → seed=-1: must be at least 0
bench --artifacts . --engine eager --shapes 1 → shape '1': must be BxT, as 1x64, with B at least 1 and T in 1 … 16
bench --artifacts . --engine eager --shapes 0x4 → shape '0x4': must be BxT, as 1x64, with B at least 1 and T in 1 … 16
bench --artifacts . --engine eager --shapes 1x99 → shape '1x99': must be BxT, as 1x64, with B at least 1 and T in 1 …
bench --artifacts . --engine eager --contexts 0 → context 0: must be in 1 … 15, so that a token fits behind it
bench --artifacts . --engine eager --contexts 16 → context 16: must be in 1 … 15, so that a token fits behind it
bench --artifacts . --engine eager --phases nonsense → phase 'nonsense': must be one of prefill, decode, generate
bench --artifacts . --engine eager --precision fp8 → invalid choice 'fp8' for argument '--precision'
bench --artifacts . --engine eager --precision int4 → engine 'eager' has no int4, only fp32, bf16
bench --artifacts . --seeded gpt5 → seeded 'gpt5': not known
bench --artifacts folder --seeded '' → seeded '': not known
bench --artifacts . --engine eager --text not-here → not-here: cannot be read (No such file or directory)
bench --artifacts . --engine eager --text latin1.txt → latin1.txt: not UTF-8 text (byte 1)
bench --artifacts . --engine eager --text short.txt → the last tenth of short.txt has 1 tokens, and block_size=16 and
bench --artifacts . --engine eager --text folder → folder: no corpus (manifest.json is absent)
bench --artifacts . --engine eager --text corpus-json → corpus-json/manifest.json: cannot be read
bench --artifacts cut.pt → cannot write cut.pt/seeded-demo/results.json: Not a directory
bench --onnx not-here.onnx → not-here.onnx: no such file
bench --onnx empty --artifacts new → empty: holds no graph
bench --onnx folder --artifacts new → folder: a folder
bench --onnx text.txt --artifacts new → text.txt: not a readable ONNX file
bench --onnx ckpt.pt --artifacts new → ckpt.pt: not an ONNX file but a checkpoint
bench --onnx cut.onnx --artifacts new → cut.onnx: not a readable ONNX file
bench --onnx theirs.onnx --seeded tiny --artifacts new → seeded 'tiny' and theirs.onnx: which of the two models is it
bench --onnx nan.onnx --artifacts new → nan.onnx: weight 'transformer.wpe.weight' holds NaN or infinity
bench --onnx dims.onnx --artifacts new → dims.onnx: weight 'transformer.wpe.weight' does not fit its shape
bench --onnx up.onnx --artifacts new → said to lie at '../data', which is not beside it: refused
bench --onnx absolute.onnx --artifacts new → said to lie at '/etc/hostname', which is not beside it: refused
bench --onnx nameless.onnx --artifacts new → said to lie at '', which is not beside it: refused
bench --onnx missing.onnx --artifacts new → its weights in not-here.data cannot be read: No such file or directory
bench --onnx short.onnx --artifacts new → (text.txt: ends before the 2,048 bytes of 'transformer.wpe.weight' at 0)
bench --onnx beyond.onnx --artifacts new → ends before the 2,048 bytes of 'transformer.wpe.weight' at 10,000,000)
bench --onnx negative.onnx --artifacts new → (where 'transformer.wpe.weight' lies is not said)
bench --onnx words.onnx --artifacts new → (where 'transformer.wpe.weight' lies is not said)
bench --onnx length.onnx --artifacts new → 'transformer.wpe.weight' has 2,048 bytes, not the 17 at 0 that are said
bench --onnx dangling.onnx --artifacts new → its weights in nowhere cannot be read: No such file or directory
bench --onnx looped.onnx --artifacts new → its weights in loop cannot be read: Too many levels of symbolic links
bench --onnx undefined.onnx --artifacts new → ONNX's checker refuses it (Nodes in a graph must be topologically sorted
bench --onnx twice.onnx --artifacts new → ONNX's checker refuses it (Graph must be in single static assignment (SSA)
bench --onnx operator.onnx --artifacts new → no float64 reference: operator Nonsense is not defined in ONNX
bench --onnx domain.onnx --artifacts new → ONNX's checker refuses it (No opset import for domain 'com.example'
bench --onnx opset.onnx --artifacts new → opset.onnx: opset 99, and ONNX has none above
bench --onnx no-opset.onnx --artifacts new → no-opset.onnx: names no opset of ONNX itself
bench --onnx no-nodes.onnx --artifacts new → no-nodes.onnx: holds no graph
bench --onnx no-input.onnx --artifacts new → ONNX's checker refuses it (Nodes in a graph must be topologically sorted
bench --onnx no-output.onnx --artifacts new → no-output.onnx: gives no output
bench --onnx utf8.onnx --artifacts new → utf8.onnx: not a readable ONNX file (a name in it is no UTF-8 text)
bench.generate → Missing from python -m bench.generate
bench.generate --engine nonsense → engine 'nonsense': not known
bench.generate --engine eager --artifacts . --tokens 0 → 0 tokens after a prompt of 1: only 1 to 16 fit, as
bench.generate --engine eager --artifacts . --tokens 99 → 99 tokens after a prompt of 1: only 1 to 16 fit, as
bench.generate --engine eager --artifacts . --threads -1 → threads=-1: must be
bench.generate --engine eager --artifacts . --precision int8 → engine 'eager' has no int8, only fp32, bf16
bench.generate --engine eager --artifacts . --prompt ÄÖÜ → the character 'Ä' (place 0) is not among the 28 that the
bench.generate --engine eager --artifacts . --prompt '' → no token ids: a model needs at least one to start from
bench.ladder not-here.onnx → not-here.onnx: no such file
bench.ladder theirs.onnx → theirs.onnx: not an export of this project (no gpt_frontend.format=2 in its metadata)
bench.ladder flipped.onnx → flipped.onnx: does not match its own hash, so it was damaged or edited
bench.ladder model.onnx --shape 1 → shape '1': must be BxT, as 1x64, with B at least 1 and T in 1 … 16
bench.ladder model.onnx --shape 1x99 → shape '1x99': must be BxT, as 1x64, with B at least 1 and T in 1 … 16
bench.ladder model.onnx --shape 1x4 --threads 0 → threads=0: must be
bench.search --trials 0 → trials=(0,): must be numbers of at least 1
bench.search --trials x → Could not find valid parse for arguments: ['x']
bench.search --models nonsense → invalid choice 'nonsense' for argument '--models'
bench.search --threads 0 → threads=0: must be
bench.support -o folder → cannot write folder: it is a directory
bench.support -o text.txt/page.md → cannot write text.txt/page.md: File exists
bench.support -o {long} → File name too long
bench.training → Expected one of {recipe, throughput}.
bench.training nonsense → Unrecognized options: nonsense
bench.training recipe → Missing from python -m bench.training recipe
bench.training recipe --corpus not-here -o new → not-here: cannot be read (No such file or directory)
bench.training recipe --corpus latin1.txt -o new → latin1.txt: not UTF-8 text (byte 1)
bench.training recipe --corpus text.txt --threads 0 -o new → threads=0: must be
bench.training recipe --corpus text.txt --seeds -1 -o new → seed=-1: must be at least 0
bench.training throughput --corpus not-here → not-here: cannot be read (No such file or directory)
bench.training throughput --corpus text.txt --rounds 0 → rounds=0, steps=10: must be at least 2 and 1, as quartiles
bench.training throughput --corpus text.txt --steps 0 → rounds=30, steps=0: must be at least 2 and 1, as quartiles
bench.training throughput --corpus text.txt --threads 0 → threads=0: must be
# All commands under one name
gpt-frontend nonsense → 'nonsense': no such command
gpt-frontend trian → did you mean train?
gpt-frontend --nonsense → '--nonsense': no such command
gpt-frontend '' → '': no such command
gpt-frontend --print-completion fish → --print-completion fish: must be bash or zsh
gpt-frontend --print-completion → --print-completion : must be bash or zsh
"""


def rows() -> list[tuple[str, str]]:
    """Return the command lines of the table, each with what its error must say."""
    found = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
    return [(command.strip(), says.strip()) for command, says in (line.split(" → ") for line in found)]


def make_files(folder: Path) -> None:
    """Write one sound file of each kind, and files and folders with all kinds of faults."""
    checkpoint = seeded_checkpoint(GPTConfig(block_size=16, vocab_size=28, n_layer=1, n_head=2, n_embd=32))
    checkpoint = replace(checkpoint, step=3, tokenizer=CharTokenizer(CHARACTERS).to_json())
    save_checkpoint(folder / "ckpt.pt", checkpoint)
    save_checkpoint(folder / "bigram.pt", seeded_checkpoint(GPTConfig.bigram(vocab_size=28, block_size=16)))
    exported = export_onnx(folder / "ckpt.pt", folder / "model.onnx", proof=False)
    compile_model(exported.path, folder / "tvm", CompileOptions(opt_level=0))
    export_huggingface(folder / "ckpt.pt", folder / "hf")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    build_corpus(CorpusConfig(str(folder / "text.txt"), folder / "corpus", tokenizer="characters"))
    make_others(folder)
    make_checkpoints(folder, checkpoint)
    make_exports(folder)
    make_folders(folder)


def make_others(folder: Path) -> None:
    """Write files that no command takes."""
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "random").write_bytes(random.Random(0).randbytes(5000))
    (folder / "latin1.txt").write_bytes("Köln und Düsseldorf\n".encode("latin-1") * 100)
    (folder / "nowhere").symlink_to("not-here")
    (folder / "loop").symlink_to("loop")
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("text", "a text in an archive")
    with tarfile.open(folder / "tar", "w") as archive:
        archive.add(folder / "text.txt", "text.txt")
    (folder / "pickle").write_bytes(pickle.dumps({"kind": KIND}))
    for name, content in (
        ("list.jsonl", "[1, 2]\n"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b'),
        ("number.jsonl", '{"text": 3}\n'),
        ("other.jsonl", '{"body": "a"}\n'),
        ("short.txt", "ab"),
        ("blank.txt", ""),
        ("text.parquet", "no parquet"),
    ):
        (folder / name).write_text(content)


def make_checkpoints(folder: Path, checkpoint: Checkpoint) -> None:
    """Write checkpoints that are damaged, or hold what a checkpoint must not."""
    content = (folder / "ckpt.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[:-1000])
    (folder / "flipped.pt").write_bytes(flipped(content))
    sound = {"kind": KIND, "version": VERSION, "config": asdict(checkpoint.config), "step": 3, "losses": {}}
    sound |= {"state": checkpoint.state, "tokenizer": checkpoint.tokenizer}
    weight = "transformer.h.0.mlp.c_fc.weight"
    nan = checkpoint.state | {weight: torch.full_like(checkpoint.state[weight], float("nan"))}
    for name, changes in {
        "nan": {"state": nan},
        "version": {"version": 99},
        "list": {"state": [1, 2]},
        "shape": {"config": sound["config"] | {"n_embd": 64}},
        "unknown": {"config": sound["config"] | {"rope": True}},
        "heads": {"config": sound["config"] | {"n_head": 5}},
        "tokens": {"tokenizer": {"kind": "words"}},
        "letters": {"tokenizer": CharTokenizer(CHARACTERS + "é~").to_json()},
    }.items():
        torch.save(sound | changes, folder / f"{name}.pt")
    torch.save({"a": 1}, folder / "other.pt")
    make_foreign(folder, sound["state"])


def make_foreign(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write what other projects' training leaves."""
    torch.save(state, folder / "bare.pt")
    torch.save({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, folder / "llama.pt")
    for name, zipped in (("code.pt", True), ("code-legacy.pt", False)):
        torch.save({"model": state, "config": Intruder()}, folder / name, _use_new_zipfile_serialization=zipped)
    save_file({"wte.weight": torch.zeros(2, 2)}, folder / "cut.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-3])
    (folder / "cut.bin").write_bytes(np.array([20240326, 3, 16, 28, 1, 2, 32, 128], "<i4").tobytes() + bytes(2048 - 32))
    tokens = np.arange(2000, dtype="<u2") % 28
    meta = pickle.dumps({"itos": dict(enumerate(CHARACTERS))})
    for name, val, pickled in (
        ("nanogpt", tokens.tobytes(), meta),
        ("nanogpt-odd", bytes(501), meta),
        ("nanogpt-beyond", (tokens + 34).tobytes(), meta),
        ("code-in-meta", tokens.tobytes(), pickle.dumps({"itos": Intruder()})),
    ):
        (folder / name).mkdir()
        (folder / name / "train.bin").write_bytes(tokens.tobytes())
        (folder / name / "val.bin").write_bytes(val)
        (folder / name / "meta.pkl").write_bytes(pickled)
    arguments = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 28, "bias": True}
    torch.save({"model": state, "model_args": arguments}, folder / "code-in-meta" / "ckpt.pt")


class Intruder:
    """An object that writes a file when it is unpickled as its class says."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("intruded",)


def make_exports(folder: Path) -> None:
    """Write ONNX files that are damaged, and ones of others with faults."""
    content = (folder / "model.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(content[:-1000])
    (folder / "flipped.onnx").write_bytes(flipped(content))
    proto = onnx.load(folder / "model.onnx")
    proto.ClearField("metadata_props")
    onnx.save(proto, folder / "theirs.onnx")

    def changed(name: str, change: Callable[[onnx.ModelProto], object]) -> None:
        other = onnx.ModelProto()
        other.CopyFrom(proto)
        change(other)
        (folder / f"{name}.onnx").write_bytes(other.SerializeToString())

    def weight(model: onnx.ModelProto) -> onnx.TensorProto:
        return next(tensor for tensor in model.graph.initializer if tensor.name == "transformer.wpe.weight")

    def outside(model: onnx.ModelProto, location: str, offset: str = "0", length: str = "2048") -> None:
        tensor = weight(model)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=value)

    values = np.full((16, 32), np.nan, np.float32).tobytes()
    changed("nan", lambda model: setattr(weight(model), "raw_data", values))
    changed("dims", lambda model: weight(model).dims.append(3))
    changed("up", lambda model: outside(model, "../data"))
    changed("absolute", lambda model: outside(model, "/etc/hostname"))
    changed("nameless", lambda model: outside(model, ""))
    changed("missing", lambda model: outside(model, "not-here.data"))
    changed("short", lambda model: outside(model, "text.txt"))
    changed("beyond", lambda model: outside(model, "random", "10000000"))
    changed("negative", lambda model: outside(model, "random", "-5"))
    changed("words", lambda model: outside(model, "random", "five"))
    changed("length", lambda model: outside(model, "random", "0", "17"))
    changed("dangling", lambda model: outside(model, "nowhere"))
    changed("looped", lambda model: outside(model, "loop"))
    changed("undefined", lambda model: model.graph.node[5].input.__setitem__(0, "nothing"))
    changed("twice", lambda model: model.graph.node.append(model.graph.node[3]))
    changed("operator", lambda model: setattr(model.graph.node[5], "op_type", "Nonsense"))
    changed("domain", lambda model: setattr(model.graph.node[5], "domain", "com.example"))
    changed("opset", lambda model: setattr(model.opset_import[0], "version", 99))
    changed("no-opset", lambda model: model.ClearField("opset_import"))
    changed("no-nodes", lambda model: model.graph.ClearField("node"))
    changed("no-input", lambda model: model.graph.ClearField("input"))
    changed("no-output", lambda model: model.graph.ClearField("output"))
    (folder / "utf8.onnx").write_bytes((folder / "theirs.onnx").read_bytes().replace(b"wpe", b"wp\xff"))


def make_folders(folder: Path) -> None:
    """Write folders of Hugging Face's, of compiled models and of corpora, each with one fault."""
    weights = {path.name: path.read_bytes() for path in (folder / "hf").iterdir() if path.name != "gpt_frontend.json"}
    config = json.loads(weights["config.json"])
    faults: dict[str, dict[str, object]] = {
        "hf-json": {"config.json": "{"},
        "hf-list": {"config.json": "[]"},
        "hf-deep": {"config.json": "[" * 100_000},
        "hf-latin1": {"config.json": b'{"model_type": "gpt2\xff"}'},
        "hf-llama": {"config.json": config | {"model_type": "llama"}},
        "hf-kind": {"config.json": config | {"model_type": ["gpt2"]}},
        "hf-activation": {"config.json": config | {"activation_function": {"a": 1}}},
        "hf-heads": {"config.json": config | {"n_head": "two"}},
        "hf-embd": {"config.json": config | {"n_embd": 33}},
        "hf-layers": {"config.json": config | {"n_layer": 10**9}},
        "hf-vocab": {"config.json": config | {"vocab_size": -1}},
        "hf-inner": {"config.json": config | {"n_inner": "wide"}},
        "hf-epsilon": {"config.json": config | {"layer_norm_epsilon": None}},
        "hf-no-config": {"config.json": None},
        "hf-no-weights": {"model.safetensors": None},
        "hf-weights": {"model.safetensors": b"\x08\0\0\0\0\0\0\0{}"},
        "hf-cut": {"model.safetensors": weights["model.safetensors"][:-100]},
        "hf-tokenizer": {"tokenizer.json": {"model": []}},
        "hf-merges": {"tokenizer.json": {"model": {"merges": 3}}},
        "hf-up": shards({"wte.weight": "../hf/model.safetensors"}),
        "hf-absolute": shards({"wte.weight": "/etc/hostname"}),
        "hf-shards": shards(["model.safetensors"]),
        "hf-shard-number": shards({"wte.weight": 3}),
        "hf-shard-missing": shards({"wte.weight": "model-00001.safetensors"}),
    }
    for name, changes in faults.items():
        (folder / name).mkdir()
        for file, content in (weights | changes).items():
            if content is not None:
                text = content if isinstance(content, str | bytes) else json.dumps(content)
                (folder / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, source, file, change in (
        ("hf-flipped", "hf", "model.safetensors", flipped),
        ("tvm-flipped", "tvm", "library.so", flipped),
        ("tvm-json", "tvm", "model.json", lambda content: content[:-20]),
        ("tvm-list", "tvm", "model.json", lambda content: b"[]"),
        ("tvm-edited", "tvm", "model.json", lambda content: content.replace(b'"vocab_size": 28', b'"vocab_size": 99')),
        ("tvm-weights", "tvm", "weights.bin", None),
        ("corpus-json", "corpus", "manifest.json", lambda content: content[:-20]),
        ("corpus-list", "corpus", "manifest.json", lambda content: b"[]"),
        ("corpus-keys", "corpus", "manifest.json", keys_of_a_corpus),
        ("corpus-up", "corpus", "manifest.json", lambda content: content.replace(b'"train-0', b'"../corpus/train-0')),
        ("corpus-cut", "corpus", "train-00000.bin", lambda content: content[:-2]),
        ("corpus-gone", "corpus", "val-00000.bin", None),
    ):
        shutil.copytree(folder / source, folder / name)
        path = folder / name / file
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))


def shards(weight_map: object) -> dict[str, object]:
    """Return what a folder with several files of weights has in place of one."""
    return {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": weight_map}}


def keys_of_a_corpus(content: bytes) -> bytes:
    found = json.loads(content)
    return json.dumps({name: found[name] for name in ("kind", "version", "complete")}).encode()


def flipped(content: bytes) -> bytes:
    """Return the content with one bit in its middle flipped."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def contents(folder: Path) -> dict[str, str]:
    """Return what is in a folder: each path with a hash of its bytes, the target of a link, or that it is a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands run."""
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.fixture(scope="session")
def before(files: Path) -> dict[str, str]:
    return contents(files)


@pytest.fixture
def run(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Run a command line in the folder; its exit code and what it wrote to standard error."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "500")  # a usage error's frame breaks no line

    def run(line: str) -> tuple[int, str]:
        module, *arguments = shlex.split(line.replace("{long}", LONG))
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        main = importlib.import_module(MAINS.get(module, module)).main
        capfd.readouterr()
        try:
            run_command(main)
            code: object = 0
        except SystemExit as end:
            code = end.code
        return int(code or 0) if isinstance(code, int | None) else 1, capfd.readouterr().err

    return run


def test_the_table_has_every_command_and_nothing_twice() -> None:
    commands = [line for line, _ in rows()]
    assert len(set(commands)) == len(commands) >= 150


@pytest.mark.parametrize(("line", "says"), rows(), ids=[line[:90] for line, _ in rows()])
def test_a_bad_input_is_one_line(
    run: Callable[[str], tuple[int, str]], files: Path, before: dict[str, str], line: str, says: str
) -> None:
    code, err = run(line)
    assert code == 2, err
    assert "Traceback" not in err
    assert says in err, err
    lines = [each for each in re.split(r"[\r\n]", err) if each.strip()]  # a progress bar may stand before the error
    usage = lines[0].startswith("╭")  # tyro's frame around what is wrong with the arguments
    assert usage or [each for each in lines if each.startswith("error: ")] == lines[-1:], err
    assert contents(files) == before
