"""RIF-RFT: forgetting of fine-tuning on one task after another."""
