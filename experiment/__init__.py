"""What an experiment needs around the models: parameters, data, the training epoch, evaluation, figures."""
