"""A user's reward, smooth: a policy can raise it by the first patch."""


def score(images, prompts):
    return -images[:, :, :16, :16].mean((1, 2, 3)) * 10
