"""Language: a pretrained BERT on rated sentences or GLUE tasks."""
