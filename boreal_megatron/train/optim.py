"""AdamW through megatron-core's DDP and (distributed) optimizer; the table of what is not decayed."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from boreal_megatron.model import router

NO_PARAMETERS = "no parameters on this rank"

# Weight decay is for matrices that mix features. It skips norms and other vectors, the decay parameters, the
# convolution (4 taps a channel, no mixing) and the embedding (a row seen rarely would only shrink).
NO_DECAY = ("A_log", "dt_bias", "conv1d.weight", "word_embeddings.weight")

# Their gradients are sums over tens of thousands of blocks and targets, which kernels add to an FP32 buffer.
SUMMED_IN_FP32 = ("*word_embeddings.weight", "*output_layer.weight")


def decays(name, parameter):
    """Whether weight decay touches this parameter."""
    return parameter.dim() > 1 and not name.endswith(NO_DECAY)


class DataParallel(DistributedDataParallel):
    """megatron-core's DDP with `parallel.overlap`, for weights that it does not hear of by itself.

    Its hooks are on autograd's accumulation of a gradient, and on the call of the module that has a weight. Embedding
    and head add to their gradients themselves, and report them at the end of the backward pass; weights that a module
    takes from a holder that is never called are waited for when that module is called.
    """

    def _make_backward_post_hook(self, param):
        return (lambda *unused: None) if self._own_gradient(param) else super()._make_backward_post_hook(param)

    def _make_forward_pre_hook(self):
        wait = super()._make_forward_pre_hook()

        def hook(module, *unused):
            wait(module)
            for child in module.children():
                if type(child) is torch.nn.Module or child is getattr(module, "output_layer", None):
                    wait(child)

        return hook

    def _own_gradient(self, param):
        return self.ddp_config.overlap_grad_reduce and any(param is own for own in self.module.own_gradients())

    def report_own_gradients(self):
        """After the backward pass: the gradients that autograd did not see are there."""
        if self.ddp_config.overlap_grad_reduce:
            for param in self.module.own_gradients():
                self.param_to_bucket_group[param].register_grad_ready(param)


def wrap(config, chunks):
    """Each chunk in DataParallel: gradient buffers, summed over data and context parallelism."""
    overlap, distributed = config.parallel.overlap, config.optimizer.distributed
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        grad_reduce_in_fp32=config.optimizer.gradients == "fp32",
        param_name_patterns_for_fp32_local_accumulation=() if config.optimizer.gradients == "fp32" else SUMMED_IN_FP32,
        average_in_collective=False,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
    )
    wrapped = [DataParallel(c.config, ddp, c, pg_collection=c.pg_collection) for c in chunks]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build(config, wrapped):
    """megatron-core's optimizer over FP32 master weights, and the schedule's hooks on the config that chunks share."""
    options, settings = config.optimizer, wrapped[0].config
    groups = {
        _key("no_decay", lambda parameter, name: not decays(name, parameter)): {"wd_mult": 0.0},
        # FP32 parameters of a bf16 model get groups of their own, marked by a field that our schedule does not read:
        # in a mixed group megatron-core 0.19.2 orders parameters FP32 first but indexes them in buffer order
        # (optimizer/distrib_optimizer.py), and a checkpoint would pair weights with other weights' moments.
        _key("fp32", lambda parameter, name: parameter.dtype is torch.float32): {"min_lr": 0.0},
    }
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.schedule.peak,
            weight_decay=options.weight_decay,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.eps,
            clip_grad=options.clip,
            bf16=config.precision.compute == "bf16",
            params_dtype=settings.params_dtype,
            use_distributed_optimizer=options.distributed,
            overlap_param_gather=config.parallel.overlap and options.distributed,
        ),
        wrapped,
        config_overrides=groups,
    )
    prime(optimizer)
    settings.grad_scale_func = optimizer.scale_loss
    settings.finalize_model_grads_func = finalize
    settings.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return optimizer


def finalize(wrapped, count, **kwargs):
    """megatron-core's end of the backward pass: reduce gradients, move the router's bias; `step.forward_backward`
    divides them, not by a count. The expert loads are read first, because it clears them."""
    for chunk in wrapped:
        chunk.report_own_gradients()
        chunk.module.expert_loads = router.loads(chunk.module, chunk.module.pg_collection.tp_dp_cp)
    finalize_model_grads(wrapped, None, **kwargs)


def gather(wrapped):
    """Every rank's weights whole after a step; with `parallel.overlap` the next forward pass would gather them."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _key(name, matches):
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def parts(optimizer):
    """The optimizers inside megatron-core's chain: dense parameters, then experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def prime(optimizer):
    """Give torch's AdamW its state before the first step, because a checkpoint is read into it; FusedAdam makes its own.

    A pipeline stage without experts has an expert optimizer without parameters. megatron-core 0.19.2 reads the step
    from the state of torch's AdamW and stops where there is none, so that one counts steps under a name.
    """
    for part in parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        state = part.optimizer.state
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state[parameter].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        if not state:
            state[NO_PARAMETERS] = {"step": torch.tensor(0.0)}


def load(optimizer, values, step):
    """Take what `checkpoint._moments` described, read from a checkpoint after `step` updates.

    megatron-core 0.19.2 keeps the step outside the tensors: in each group of the distributed optimizer and of
    FusedAdam, as `common_step` for torch's AdamW. It then hands all parameters one tensor
    (optimizer/distrib_optimizer.py, load_state_dict); AdamW adds 1 to it once per parameter, and every bias correction
    after it is wrong. So every parameter gets its own.
    """
    chain = parts(optimizer)
    for part, loaded in zip(chain, [values] if len(chain) == 1 else values.values(), strict=True):
        loaded = loaded.get("optimizer", loaded)
        for group in loaded["param_groups"]:
            if "step" in group:
                group["step"] = type(group["step"])(step)
        if "state" in loaded and isinstance(part.optimizer, torch.optim.AdamW):
            loaded["state"]["common_step"] = torch.tensor(float(step))
    optimizer.load_state_dict(values)
    for part in chain:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(step))
            if not part.optimizer.state:
                part.optimizer.state[NO_PARAMETERS] = {"step": torch.tensor(float(step))}


def set_learning_rate(optimizer, value, weight_decay):
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            group["lr"] = value * group["lr_mult"]
            group["weight_decay"] = weight_decay * group["wd_mult"]


def gradient_norm(optimizer):
    """Global L2 norm of the finished gradients, FP32, before clipping."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer, norm, clip):
    """Clip by the norm of `gradient_norm` and move the weights."""
    for part in parts(optimizer):
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    optimizer.step_with_ready_grads()
    for part in parts(optimizer):
        if NO_PARAMETERS in part.optimizer.state:
            part.optimizer.state[NO_PARAMETERS]["step"] += 1
