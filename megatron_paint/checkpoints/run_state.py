"""The file that a training run writes into each checkpoint. It has the step, the settings and the model's sizes."""

RUN_STATE = "run_state.json"
