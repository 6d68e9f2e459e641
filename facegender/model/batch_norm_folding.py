"""Fold frozen BatchNorm into the convolution before it to train faster, and take it out again.

A BatchNorm that keeps its statistics is a scale and a shift for each channel. Multiplied into the
convolution's kernel and bias (Jacob et al., Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2) it costs nothing. As a separate
layer it passes twice over tensors that are larger than any cache.
"""

import keras
import numpy as np


def fold_batch_norm(base: keras.Model) -> keras.Model:
    """Return a model that computes the same without BatchNorm, on images of any size.

    Args:
        base: float32 (n, size, size, 3) to (n, features), such as MobileNet: layers in a row, in
            which each BatchNorm `x_bn` follows the convolution `x` without a bias.

    Returns:
        A model float32 (n, any, any, 3) to (n, features), with convolutions of the same names.
    """
    image = keras.Input((None, None, *base.input_shape[3:]))
    outputs = image
    folded = {}
    for layer in base.layers[1:]:
        if isinstance(layer, keras.layers.BatchNormalization):
            continue
        config = layer.get_config()
        if _is_convolution(layer):
            config["use_bias"] = True
            folded[layer.name] = layer.__class__.from_config(config)
            outputs = folded[layer.name](outputs)
        else:
            outputs = layer.__class__.from_config(config)(outputs)
    for name, layer in folded.items():
        norm = base.get_layer(f"{name}_bn")
        scale = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
        shift = norm.beta.numpy() - norm.moving_mean.numpy() * scale
        kernel = base.get_layer(name).kernel.numpy()
        # A depthwise kernel is (h, w, channels, 1), any other (h, w, inputs, channels).
        channels = scale[:, None] if kernel.shape[3] != len(scale) else scale
        layer.set_weights([kernel * channels, shift])
    return keras.Model(image, outputs, name=f"{base.name}_folded")


def unfold_batch_norm(folded: keras.Model, base: keras.Model) -> None:
    """Write the weights of a folded model back into the model it was made from.

    Kernels are copied. BatchNorm gets a scale of 1, and the bias as its shift.
    """
    for layer in folded.layers:
        if not _is_convolution(layer):
            continue
        kernel, bias = layer.get_weights()
        norm = base.get_layer(f"{layer.name}_bn")
        base.get_layer(layer.name).set_weights([kernel])
        ones = np.ones_like(bias)
        # Variance and epsilon add up to 1.
        norm.set_weights([ones, bias, np.zeros_like(bias), ones * (1 - norm.epsilon)])


def _is_convolution(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
