"""Studies ready to launch, one YAML file each; `cli.presets` reads them."""
