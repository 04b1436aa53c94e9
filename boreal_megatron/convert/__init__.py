"""Between training checkpoints and the Hugging Face format: names, layouts, files and the modelling code."""
