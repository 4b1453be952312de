import os

# Before any Hugging Face import: nothing in the suite may reach for the network or wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# The models are tiny and the tests run on every core at once: threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
