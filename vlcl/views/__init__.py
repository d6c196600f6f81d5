"""Pictures alone (`model.kind: views`): an image tower, its projector and predictor, and their momentum copy (MoCo-v3).

towers.py has the modules, vit.py what is done to ViTs, norm.py BatchNorm over ranks, build.py puts them together;
vlcl/data/views.py makes the views, and vlcl/losses/views.py is the loss.
"""
