"""Training runs whose model gets a padding mask: every token whose id is a multiple of 5."""


def main(todo: str, folder: str) -> None:
    """As training_cases: the cases of a file, one after another."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from tests import training_cases

    forward = GPTModel.forward

    def padded(self, input_ids, *arguments, **named):
        return forward(self, input_ids, *arguments, padding_mask=input_ids % 5 == 0, **named)

    GPTModel.forward = padded
    training_cases._main(todo, folder)
