"""What a model is: facts from its config, weights from its modules. The only room that knows families."""
