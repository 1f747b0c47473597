"""Settings of every test of the TensorFlow backend."""

from __future__ import annotations

import os

import quick_xla

os.environ["XLA_FLAGS"] = quick_xla.flags()

import tensorflow as tf

# Two devices, so that a strategy over several has something to do.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
