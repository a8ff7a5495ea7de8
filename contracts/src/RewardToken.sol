// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {IRewardToken} from "./interfaces/IRewardToken.sol";

/// @title The token of a devnet
contract RewardToken is ERC20, ERC20Permit, Ownable, IRewardToken {
    /// @param owner who may mint
    constructor(address owner)
        ERC20("OpenLoRA Devnet Token", "dLORA")
        ERC20Permit("OpenLoRA Devnet Token")
        Ownable(owner)
    {}

    /// @inheritdoc IRewardToken
    function mint(address to, uint256 amount) external onlyOwner {
        _mint(to, amount);
    }

    /// @inheritdoc ERC20Permit
    function nonces(address owner) public view override(ERC20Permit, IERC20Permit) returns (uint256) {
        return super.nonces(owner);
    }
}
