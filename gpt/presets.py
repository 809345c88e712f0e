"""Runs with a name: recipes that somebody has published, and two to try things with."""

from dataclasses import replace

from gpt.train_config import TrainConfig

# nanoGPT's README, "I only have a macbook": published best validation loss 1.88 on tinyshakespeare
CHAR_CPU = TrainConfig(activation="gelu", max_steps=2000)

# nanoGPT's config/train_shakespeare_char.py: published best validation loss 1.4697 on tinyshakespeare
CHAR = TrainConfig(
    n_layer=6,
    n_head=6,
    n_embd=384,
    block_size=256,
    dropout=0.2,
    activation="gelu",
    batch_size=64,
    max_steps=5000,
    eval_batches=200,
)

# gpt.py of https://github.com/karpathy/ng-video-lecture, for 6,000 steps: a constant rate, PyTorch's AdamW, no clipping
LECTURE = replace(
    CHAR,
    bias=True,
    activation="relu",
    tied_head=False,
    learning_rate=3e-4,
    min_lr=3e-4,
    warmup_steps=0,
    weight_decay=0.01,
    beta2=0.999,
    grad_clip=0.0,
    max_steps=6000,
    eval_interval=500,
)

# train_gpt2.py of https://github.com/karpathy/build-nanogpt: 2**19 tokens an update, one pass over 10 billion
GPT2 = TrainConfig(
    tokenizer="gpt2",
    order="sequential",
    n_layer=12,
    n_head=12,
    n_embd=768,
    block_size=1024,
    bias=True,
    batch_size=512,
    micro_batch_size=16,
    max_steps=19_073,
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_steps=715,
    beta2=0.95,
    save_interval=1000,
    compile=True,
)

# The larger shapes are GPT-2's (table 2 of its paper), their rates GPT-3's (table 2.1 of https://arxiv.org/abs/2005.14165)
PRESETS = {
    "demo": ("char-cpu, shortened to about a minute on two cores", TrainConfig()),
    "tiny": (
        "a toy in seconds, to see that everything works",
        TrainConfig(
            n_layer=2,
            n_head=2,
            n_embd=32,
            block_size=32,
            max_steps=100,
            warmup_steps=10,
            eval_interval=50,
            eval_batches=5,
        ),
    ),
    "bigram": (
        "a table of what follows what: the smallest model that walks the whole path",
        TrainConfig(
            model="bigram",
            block_size=8,
            batch_size=32,
            learning_rate=1e-2,
            min_lr=1e-2,
            warmup_steps=0,
            weight_decay=0.0,
            max_steps=3000,
            eval_interval=500,
            save_interval=500,
        ),
    ),
    "overfit": (
        "one batch, learned by heart within 30 steps: if this fails, the model or the loop is wrong",
        TrainConfig(
            order="one",
            hand_on="last",
            n_layer=2,
            n_embd=256,
            batch_size=4,
            block_size=32,
            learning_rate=3e-3,
            min_lr=3e-3,
            warmup_steps=3,
            weight_decay=0.0,
            beta2=0.9,
            max_steps=30,
            eval_interval=10,
            eval_batches=1,
        ),
    ),
    "char-cpu": ("nanoGPT's recipe for a CPU; minutes on two cores", CHAR_CPU),
    "char": ("nanoGPT's character model, 10.7 million parameters; minutes on a GPU", CHAR),
    "char-lecture": ("the same shape as Karpathy's lecture trains it", LECTURE),
    "shakespeare-char": ("another name of char", CHAR),
    "gpt2-124m": ("GPT-2, as build-nanogpt trains it; 1.5 hours on eight A100s", GPT2),
    "gpt2-medium": (
        "GPT-2 with 355 million parameters",
        replace(GPT2, n_layer=24, n_head=16, n_embd=1024, micro_batch_size=8, learning_rate=3e-4, min_lr=3e-5),
    ),
    "gpt2-large": (
        "GPT-2 with 774 million parameters",
        replace(GPT2, n_layer=36, n_head=20, n_embd=1280, micro_batch_size=4, learning_rate=2.5e-4, min_lr=2.5e-5),
    ),
    "gpt2-xl": (
        "GPT-2 with 1.56 billion parameters",
        replace(GPT2, n_layer=48, n_head=25, n_embd=1600, micro_batch_size=2, learning_rate=2e-4, min_lr=2e-5),
    ),
}
