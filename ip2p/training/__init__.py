"""Fine-tuning a widened UNet on kept pairs. A plain library: how workers are started and joined is for a job."""
