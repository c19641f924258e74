"""NeMo parts that several unit tests share."""

ADAPTERS = {
    "ours": {"_target_": "nemo_mtbi.modules.connectors.StackMLPConnector", "factor": 2, "hidden_dim": 16},
    "nemo": {"_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector", "d_model": 16},
}
