"""A slow twin of the paper's Algorithm 1, a line of code for a line of the algorithm.

Plain floats and lists, vanilla gradient descent, two losses. Of quotients by zero the paper is
silent: a loss that never had a gradient conflicts with none, and gets no weight; the first step,
which has no past, weighs both losses by a half. Its t counts from a loss's first gradient on.
"""

from math import hypot


def inner(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def quotient(a, b):
    return a / b if b else 0.0


class Twin:
    def __init__(self, theta, lr, beta_1, beta_2):
        self.theta = list(theta)
        self.lr, self.beta_1, self.beta_2 = lr, beta_1, beta_2
        self.t = [0, 0]
        self.m_hat = [[0.0] * len(self.theta) for _ in range(2)]
        self.v_hat = [0.0, 0.0]

    def moments(self):
        """Lines 8-11."""
        began = [max(t, 1) for t in self.t]
        m_1, m_2 = (
            [x / (1 - self.beta_1**t) for x in m] for m, t in zip(self.m_hat, began, strict=True)
        )
        v_1, v_2 = (v / (1 - self.beta_2**t) for v, t in zip(self.v_hat, began, strict=True))
        return m_1, m_2, v_1, v_2

    def weights(self, abstract_first):
        """Lines 12-22: κ_adv, κ_IBP, κ_reg."""
        m_1, m_2, v_1, v_2 = self.moments()
        if v_1 == v_2 == 0:
            return 0.5, 0.5, 0.0
        if inner(m_1, m_2) > 0 or 0 in (v_1, v_2):
            d = [quotient(x, v_1) + quotient(y, v_2) for x, y in zip(m_1, m_2, strict=True)]
            gamma = inner([x + y for x, y in zip(m_1, m_2, strict=True)], d) / inner(d, d) / 2
            return quotient(gamma, v_1), quotient(gamma, v_2), 0.0
        if not abstract_first:
            return 1.0, quotient(-inner(m_1, m_2), v_2**2), 0.0
        return quotient(-inner(m_1, m_2), v_1**2), 1.0, 0.5

    def step(self, g_adv, g_ibp, loss_ibp, abstract_first):
        """One step of Algorithm 2, lines 10-12; then lines 4-7 of Algorithm 1 for the next."""
        kappa_adv, kappa_ibp, kappa_reg = self.weights(abstract_first)
        for i, (g_1, g_2) in enumerate(zip(g_adv, g_ibp, strict=True)):
            # d(κ_reg L²) = 2 κ_reg L dL
            self.theta[i] -= self.lr * (
                kappa_adv * g_1 + kappa_ibp * g_2 + 2 * kappa_reg * loss_ibp * g_2
            )
        for k, g in enumerate((g_adv, g_ibp)):
            self.m_hat[k] = [
                self.beta_1 * m + (1 - self.beta_1) * x
                for m, x in zip(self.m_hat[k], g, strict=True)
            ]
            self.v_hat[k] = self.beta_2 * self.v_hat[k] + (1 - self.beta_2) * hypot(*g)
            self.t[k] += self.t[k] > 0 or any(g)
        return kappa_adv, kappa_ibp, kappa_reg
