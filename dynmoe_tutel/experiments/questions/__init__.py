"""The experiment `questions`: what reviewers asked DynMoE, each question answered by runs that share their protocol."""
