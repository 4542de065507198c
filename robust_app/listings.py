"""What there is to choose from, as tables."""

from rich.table import Table

from robust_app import data, methods, models, recipes, verifiers
from robust_app.reporting import listing

MNIST = (1, 28, 28)


def of_recipes() -> list[Table]:
    """The recipes by the parts of their names."""
    families = recipes.families()
    pattern = "".join(f"[-{kind.upper()}]" for kind in recipes.KINDS)
    rows = [(f"{family.name}{pattern}", family.description) for family in families]
    tables = [listing(("recipe", "what it trains"), rows)]
    for family in families:
        parts = [
            (kind.upper(), ", ".join(map(family.shown, family.choices(kind))), family.default(kind))
            for kind in recipes.KINDS
        ]
        tables.append(listing((f"{family.name}-…", "one of", "if left out"), parts))
    return tables


def of_models() -> list[Table]:
    """The networks that a recipe's ``model`` names."""
    rows = [
        (
            name,
            architecture.layers,
            architecture.description,
            f"{models.parameter_count(name, MNIST, classes=10):,}",
        )
        for name, architecture in models.MODELS.items()
    ]
    return [listing(("model", "hidden layers", "what it is", "parameters, MNIST"), rows)]


def of_methods() -> list[Table]:
    """The methods that a recipe's ``method`` names."""
    rows = [(name, method.description) for name, method in methods.METHODS.items()]
    return [listing(("method", "losses and weights"), rows)]


def of_verifiers() -> list[Table]:
    """The verifiers that ``evaluate --verifier`` takes."""
    rows = [(name, verifier.description) for name, verifier in verifiers.VERIFIERS.items()]
    return [listing(("verifier", "what it proves with"), rows)]


def of_datasets() -> list[Table]:
    """The data sets that a recipe's ``dataset`` names."""
    return [listing(("data set", "what it holds"), data.DATASETS.items())]
