"""What to say about an unknown setting: the setting that was meant, or where it is."""

import difflib
from collections.abc import Iterable, Mapping

_MEANT = {
    "adapter_path": "init_from",
    "alpha": "step_size",
    "arch checkpoint_name model_name name": "backbone",
    "accumulation_steps grad_accum grad_accum_steps grad_accumulation": "gradient_accumulation_steps",
    "augmentation aug": "augment",
    "bs bsz train_batch_size global_batch_size batchsize": "batch_size",
    "beta beta1 beta2 adam_betas": "betas",
    "cache": "cache_dir",
    "checkpoint ckpt pretrained_path weights": "checkpoint_path resume_from",
    "checkpoint_folder checkpoints ckpt_dir": "checkpoint_dir",
    "classes n_classes nb_classes": "num_classes",
    "clip clip_grad clip_norm gradient_clipping max_grad_norm max_norm": "grad_clip",
    "crop_ratio": "crop_pct",
    "dtype amp mixed_precision": "precision",
    "ema model_ema model_ema_decay": "ema_decay",
    "epsilon epsilons radius": "eps",
    "experiment": "experiment_name",
    "grad_checkpointing gradient_checkpointing": "activation_checkpointing",
    "image_sz img_size input_size resolution": "image_size",
    "learning_rate lr_rate base_lr max_lr peak_lr": "lr",
    "lora_alpha": "alpha",
    "lora_rank lora_r r": "rank",
    "max_epochs n_epochs num_epochs num_train_epochs epoch": "epochs",
    "min_learning_rate eta_min end_lr": "min_lr",
    "model_name_registered registered_model": "registered_model_name",
    "n n_examples n_samples num_examples num_images": "num_samples",
    "n_steps num_steps num_iter iterations iters n_iter attack_steps pgd_steps nb_iter": "steps",
    "n_replays num_replays m": "replays",
    "n_workers workers dataloader_num_workers nproc": "num_workers",
    "optimizer optimiser": "optim",
    "dataset datasets": "data",
    "out output output_folder save_dir outdir": "output_dir",
    "random_seed random_state": "seed",
    "resume": "resume_from",
    "save_every save_steps save_freq checkpoint_interval": "checkpoint_every",
    "step_length stepsize eps_step eps_iter": "step_size",
    "train_data train_dir train_path": "train",
    "tracking_uri mlflow_uri": "uri",
    "val val_data val_dir valid validation_data": "validation",
    "warmup warmup_fraction warmup_steps warmup_epochs": "warmup_ratio",
    "wd decay l2": "weight_decay",
    "zero zero_optimization stage": "zero_stage",
}
MEANT = {word: ours.split() for words, ours in _MEANT.items() for word in words.split()}
"""What other programs of the field call our settings."""


def suggestion(key: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """One of "did you mean lr?", what `elsewhere` says, and "known: a, b, c".

    Args:
        known: the settings of the section.
        elsewhere: of settings of other sections, where they are.
    """
    known, elsewhere = list(known), elsewhere or {}
    word = key.lower().replace("-", "_")
    names = [word, *MEANT.get(word, ())]
    meant = next((name for name in names if name in known), None)
    if meant is None and word in elsewhere:  # a setting's right name is no mistyped other one
        return elsewhere[word]
    meant = meant or _mistyped(word, known)
    if meant is not None:
        return f"did you mean {meant}?"
    return next((elsewhere[name] for name in names if name in elsewhere), f"known: {', '.join(known)}")


def _mistyped(word: str, known: list[str]) -> str | None:
    near = difflib.get_close_matches(word, known, 1, 0.75)
    if near:
        return near[0]
    begun = [name for name in known if len(word) >= 4 and name.startswith(word)]
    if len(begun) == 1:
        return begun[0]
    words = {} if word in MEANT else {other: name for other, names in MEANT.items() for name in names if name in known}
    words |= {first: name for name in known if len(first := name.partition("_")[0]) >= 5}
    near = difflib.get_close_matches(word, words, 1, 0.8)
    return words[near[0]] if near else None
