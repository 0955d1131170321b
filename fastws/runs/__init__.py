"""What every long job shares: how it begins, resumes, stops and logs, and its rates."""
