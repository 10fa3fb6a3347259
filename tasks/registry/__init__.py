"""What a registered model is: a version in MLflow's registry that serves itself and tells where it is from."""
