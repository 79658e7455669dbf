"""Fine-tuning on tables of texts and labels, and predictions of models with heads.

``table`` reads rows; ``tasks`` says what a task is, ``sequences``, ``tagging`` and ``answering``
are the ones there are, ``kinds`` chooses; ``finetune`` is a run, ``predicting`` what a checkpoint
says, ``report`` and ``page`` what people are told.
"""
