"""How the bundled model was made: data, training, evaluation."""
