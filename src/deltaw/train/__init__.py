"""Data loading, training on transformers.Trainer, scoring and loading what was trained."""

from deltaw._callable import make_callable
from deltaw.train.data import TaskData, load_data
from deltaw.train.evaluate import Evaluation, class_logits, evaluate
from deltaw.train.load import load, read_record
from deltaw.train.probe import Probe, classifier_inputs, fit_probe, mean_pooled_features
from deltaw.train.run import (
    PLAIN,
    RECORD,
    TrainedModel,
    check_method,
    count_trainable,
    head_sites,
    prepare,
    save_model,
    train,
)
from deltaw.train.tokenise import batches, collator, tokenise
from deltaw.train.trainer import TrainOptions, TrainResult, train_model

__all__ = [
    "PLAIN",
    "RECORD",
    "Evaluation",
    "Probe",
    "TaskData",
    "TrainOptions",
    "TrainResult",
    "TrainedModel",
    "batches",
    "check_method",
    "class_logits",
    "classifier_inputs",
    "collator",
    "count_trainable",
    "evaluate",
    "fit_probe",
    "head_sites",
    "load",
    "load_data",
    "mean_pooled_features",
    "prepare",
    "read_record",
    "save_model",
    "tokenise",
    "train",
    "train_model",
]

make_callable(__name__, train)
