"""Methods of the area lowrank."""
