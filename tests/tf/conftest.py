"""Settings of every test of the TensorFlow backend."""

from __future__ import annotations

import os

import xla_test_flags

os.environ["XLA_FLAGS"] = xla_test_flags.flags()

import tensorflow as tf

# Two devices, so that a strategy over several has something to do.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
