"""Training as the definition says it, in one straight line: plain tensors and formulas.

Written from the definition of the method, not from the package; nothing here imports it. Losses
have SAELens's scale (sums over d_in), which matters because its trainer clips the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.oracle import keep_brute_force


class StraightLineTraining:
    """One SAE and its Adam, as named float64 tensors."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        afa_coefficient: float,
        aux_coefficient: float,
        top_k_aux: int,
        dead_window: int,
        lr: float,
        beta1: float,
        beta2: float,
    ):
        self.weights = {
            name: weights[name].double().clone().requires_grad_()
            for name in ("W_enc", "W_dec", "b_dec")
        }
        self.afa_coefficient, self.aux_coefficient = afa_coefficient, aux_coefficient
        self.top_k_aux, self.dead_window = top_k_aux, dead_window
        self.lr, self.beta1, self.beta2 = lr, beta1, beta2
        self.silent = torch.zeros(weights["W_dec"].shape[0])
        self.moments = {
            name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()
        }
        self.steps = 0

    def step(self, x: Tensor) -> tuple[dict[str, float], Tensor]:
        """One step on activations ``[batch, d_in]``: the losses and the kept mask."""
        W_enc, W_dec, b = (self.weights[name] for name in ("W_enc", "W_dec", "b_dec"))
        x = x.double()
        d_in = x.shape[1]
        z = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)

        a = torch.relu((z - b) @ W_enc)
        row_norm = W_dec.norm(dim=1)
        target = (z - b).norm(dim=1)
        kept = torch.from_numpy(
            keep_brute_force((a * row_norm).detach().numpy(), target.detach().numpy())
        )
        f = a * kept
        z_hat = f @ W_dec + b
        dead = self.silent > self.dead_window

        mse = (z_hat - z).pow(2).mean()
        afa = ((f * row_norm).norm(dim=1) - z.norm(dim=1)).pow(2).mean()
        aux = torch.zeros((), dtype=torch.float64)
        if dead.any():
            only_dead = torch.where(dead, a, 0.0)
            order = only_dead.argsort(dim=1, descending=True, stable=True)
            best = torch.zeros_like(only_dead).scatter(1, order[:, : self.top_k_aux], 1.0)
            aux = ((only_dead * best) @ W_dec - (z - z_hat)).pow(2).mean()
        losses = {
            "mse_loss": d_in * mse,
            "afa_loss": d_in * self.afa_coefficient * afa,
            "auxiliary_reconstruction_loss": d_in * self.aux_coefficient * aux,
        }
        grads = dict(
            zip(
                self.weights,
                torch.autograd.grad(sum(losses.values()), list(self.weights.values())),
                strict=True,
            )
        )

        with torch.no_grad():
            # unit rows, and no gradient along them
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            grads["W_dec"] -= (grads["W_dec"] * W_dec).sum(1, keepdim=True) * W_dec
            # SAELens clips the norm of the whole gradient at 1
            total = torch.stack([g.pow(2).sum() for g in grads.values()]).sum().sqrt()
            scale = min(1.0, 1.0 / (total.item() + 1e-6))
            self.steps += 1
            for name, weight in self.weights.items():
                g = grads[name] * scale
                m, v = self.moments[name]
                m.mul_(self.beta1).add_((1 - self.beta1) * g)
                v.mul_(self.beta2).add_((1 - self.beta2) * g * g)
                m_hat = m / (1 - self.beta1**self.steps)
                v_hat = v / (1 - self.beta2**self.steps)
                weight -= self.lr * m_hat / (v_hat.sqrt() + 1e-8)
            self.silent += 1
            self.silent[kept.any(0)] = 0
        return {name: value.item() for name, value in losses.items()}, kept
