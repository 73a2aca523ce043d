"""Other people's training loops take ``MuonConfig(...).build(model)`` as it is: same losses, and exact resumption."""

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler

from danlu.optim import CombinedOptimizer, MuonConfig

transformers = pytest.importorskip("transformers")

HALF, ROWS = 10, 4  # steps of an epoch, of which there are two; rows of a batch


def network():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=16))


def rows():
    tokens = torch.randint(61, (HALF * ROWS, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def made():
    """Return a network, its one optimizer, a schedule, and the list that will hold the loss of every step."""
    model, losses = network(), []
    optimizer = MuonConfig(lr=0.03, embedding_lr=0.1).build(model)
    assert isinstance(optimizer, CombinedOptimizer)
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 - step / (3 * HALF)), losses


def loader():
    return DataLoader(rows(), batch_size=ROWS)


def plain(folder, *, resume):
    """A loop as anybody writes it."""
    model, optimizer, schedule, losses = made()
    if resume:
        saved = torch.load(folder / "saved.pt", weights_only=True)
        for each, state in zip((model, optimizer, schedule), saved):
            each.load_state_dict(state)
    for epoch in range(int(resume), 2):
        for batch in loader():
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if epoch == 0:
            torch.save([each.state_dict() for each in (model, optimizer, schedule)], folder / "saved.pt")
    return losses


def with_transformers(folder, *, resume):
    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    model, optimizer, schedule, losses = made()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=ROWS,
        max_grad_norm=0.0,
        save_steps=HALF,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return losses


def with_lightning(folder, *, resume):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer, self.schedule, self.losses = made()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[lightning.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1)],
    )
    trainer.fit(module, loader(), ckpt_path=str(folder / f"step={HALF}.ckpt") if resume else None)
    return module.losses


def with_accelerate(folder, *, resume):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model, optimizer, schedule, losses = made()
    model, optimizer, schedule, batches = accelerator.prepare(model, optimizer, schedule, loader())
    if resume:
        accelerator.load_state(str(folder / "saved"))
    for epoch in range(int(resume), 2):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if epoch == 0:
            accelerator.save_state(str(folder / "saved"))
    return losses


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return plain(tmp_path_factory.mktemp("plain"), resume=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", [plain, with_transformers, with_lightning, with_accelerate])
def test_a_tiny_llama_trains_and_resumes_alike_in_every_loop(loop, expected, tmp_path):
    assert len(expected) == 2 * HALF
    assert expected[-1] < 0.9 * expected[0]
    near = partial(pytest.approx, abs=1e-6, rel=1e-6)
    assert loop(tmp_path, resume=False) == near(expected)
    assert loop(tmp_path, resume=True) == near(expected[HALF:])
