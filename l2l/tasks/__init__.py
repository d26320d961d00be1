"""Families of problems to optimize, and wrappers that make any family more diverse."""

from l2l.tasks.architectures import mixer as mixer
from l2l.tasks.architectures import residual as residual
from l2l.tasks.architectures import resnet as resnet
from l2l.tasks.architectures import row_lstm as row_lstm
from l2l.tasks.architectures import vit as vit
from l2l.tasks.augment import convex as convex
from l2l.tasks.augment import noise as noise
from l2l.tasks.augment import rescale as rescale
from l2l.tasks.autoencoder import autoencoder as autoencoder
from l2l.tasks.autoencoder import vae as vae
from l2l.tasks.few_shot import few_shot as few_shot
from l2l.tasks.images import cifar as cifar
from l2l.tasks.images import conv as conv
from l2l.tasks.images import mnist as mnist
from l2l.tasks.logistic import logistic as logistic
from l2l.tasks.mlp import mlp as mlp
from l2l.tasks.quadratic import quadratic as quadratic
from l2l.tasks.quadratic import simple as simple
from l2l.tasks.quadratic import simple_multi as simple_multi
from l2l.tasks.regression import regression as regression
from l2l.tasks.sinusoid import sinusoid as sinusoid
from l2l.tasks.text import char_lstm as char_lstm
from l2l.tasks.text import gru as gru
from l2l.tasks.text import nanogpt as nanogpt
from l2l.tasks.text import transformer as transformer
