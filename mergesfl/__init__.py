"""MergeSFL: split federated learning with feature merging and batch size regulation.

Paper: Liao, Xu, Xu, Wang, Yao, Qiao. "MergeSFL: Split Federated Learning with Feature Merging and Batch Size
Regulation." ICDE 2024. https://arxiv.org/abs/2311.13348
"""

__version__ = "0.1.0"
