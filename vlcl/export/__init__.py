"""`vlcl export`: one folder that transformers, open_clip, sentence-transformers and ONNX Runtime load, checked."""
