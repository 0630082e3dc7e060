"""Where infected models come from: architectures, attacks, data sets, the trainer, files, and the catalogue of names."""
