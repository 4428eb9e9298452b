"""How much each input of a layer matters: collected from a model or a folder, and looked up."""
